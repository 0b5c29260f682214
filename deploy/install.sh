#!/bin/sh
# Makes .venv at the top of the repository with TuckA runtime and, optionally, extras:
#   sh deploy/install.sh          what serving needs
#   sh deploy/install.sh test     and what the tests need
# Where there is no NVIDIA GPU it takes torch's CPU build, never gigabytes of CUDA. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        # The "+cpu" makes it this build or none: no other index has a package of that version.
        .venv/bin/pip install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
    else
        .venv/bin/pip install -q torch==2.13.0
    fi
fi
.venv/bin/pip install -q -e ".${1:+[$1]}"
