#!/bin/sh
# ruff, then the type check of the package as it is installed, which is not the tree that it is made from.
set -eu
cd "$(dirname "$0")/.."
top=$(pwd)
.venv/bin/ruff check .
.venv/bin/ruff format --check .
installed=$(mktemp -d)
copy=$(mktemp -d)  # setuptools builds in the tree, where a test may be building too
trap 'rm -rf "$installed" "$copy"' EXIT
tar -cf - --exclude=./.venv --exclude=./.git --exclude=./build . | tar -xf - -C "$copy"
.venv/bin/pip install -q --no-deps --no-compile --target "$installed" "$copy"
cd "$installed"
"$top/.venv/bin/mypy" --config-file "$top/pyproject.toml" --python-executable "$top/.venv/bin/python" -p tucka_runtime
