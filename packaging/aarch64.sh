#!/usr/bin/env bash
# Make a Python for 64-bit Arm with lowtide's wheel in the folder $1; FOLDER/python runs it under qemu-user.
# Needs apt, qemu-user and g++-aarch64-linux-gnu. $PYTHON is a Python with pip, QCPU the processor to emulate.
set -euo pipefail
mkdir -p "$1"
folder=$(realpath "$1")
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")

if [ ! -e "$folder/root/usr/bin/python3" ]; then
    # Packages of the other architecture, without touching those of this system.
    mkdir -p "$folder"/apt/{lists/partial,archives/partial}
    : > "$folder/apt/status"
    apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=0
        -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status"
        -o Dir::Cache::Archives="$folder/apt/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    "${apt[@]}" update
    "${apt[@]}" install --yes --download-only python3 libstdc++6 libgomp1
    for package in "$folder"/apt/archives/*.deb; do dpkg -x "$package" "$folder/root"; done
fi
version=$(basename "$folder"/root/usr/bin/python3.* | sed 's/^python//')

rm -rf "$folder/wheels" "$folder/site"
_PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_ARGS="-DCMAKE_TOOLCHAIN_FILE=$PWD/packaging/aarch64.cmake" \
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" .
platforms=()
for name in linux manylinux2014 manylinux_2_17 manylinux_2_27 manylinux_2_28; do platforms+=(--platform "${name}_aarch64"); done
"$python" -m pip install --quiet --target "$folder/site" --only-binary :all: --implementation cp \
    --python-version "$version" "${platforms[@]}" "$(ls "$folder"/wheels/lowtide-*.whl)[prebuilt,onnx]"

cat > "$folder/python" <<END
#!/bin/sh
exec qemu-aarch64 -cpu "\${QCPU:-max}" -L "$folder/root" -E PYTHONPATH="$folder/site" -E PYTHONDONTWRITEBYTECODE=1 \\
    "$folder/root/usr/bin/python3" "\$@"
END
chmod +x "$folder/python"
