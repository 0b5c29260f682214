#!/bin/sh
# Makes .venv at the top of the repository with TuckA runtime and, optionally, extras:
#   sh deploy/install.sh                   what serving needs
#   sh deploy/install.sh train,loadtest    and what `tucka train` and `tucka loadtest` need; otel: traces,
#                                          data: Parquet and datasets' folders to train on,
#                                          report: TensorBoard's files; gguf: bases in a GGUF file;
#                                          demo: train and gguf; s3, gs: adapters in object stores;
#                                          quant: bases in 4 or 8 bits; harness: lm-eval's tasks; ray: many servers under Ray Serve
#   sh deploy/install.sh test              and what the tests need: all of these but quant, harness, s3, gs and ray
# Where there is a C++ compiler (CXX names another than c++) it also builds the native kernels.
# Where there is no NVIDIA GPU it takes torch's CPU build, never gigabytes of CUDA. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/pip ]; then  # pip comes last: a Debian without python3-venv leaves a python alone
    echo "making .venv ..."
    "${PYTHON:-python3}" -m venv .venv
fi

torch=$(cat deploy/torch.txt)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        echo "installing torch, CPU build (200 MB) ..."
        # The "+cpu" makes it this build or none: no other index has a package of that version.
        .venv/bin/pip install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu"
    else
        echo "installing torch ..."
        .venv/bin/pip install -q "$torch"
    fi
fi
echo "installing TuckA runtime${1:+ with the extras $1} ..."
.venv/bin/pip install -q -e ".${1:+[$1]}"
if [ "$(uname -s)" != Linux ] || ! command -v "${CXX:-c++}" >/dev/null; then
    echo "no C++ compiler for the native kernels: on a CPU the slower ones in torch will serve"
else
    echo "building the native kernels (a minute) ..."
    .venv/bin/python -m tucka_runtime.kernels.native.build || echo "on a CPU the slower ones in torch will serve"
fi
echo "done: .venv/bin/tucka"
