#!/usr/bin/env bash
# Build the wheel, install it outside the checkout, and run tests/smoke against it.
# $PYTHON is a Python whose environment has lowtide's dependencies and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$outside/dist" .
"$python" -m venv --without-pip "$outside/venv"
site=$("$outside/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -m pip install --quiet --no-deps --target "$site" "$outside"/dist/lowtide-*.whl
# Dependencies are used from the other environment. The .pth files of a folder that a .pth file adds are
# not read, so the editable install of lowtide there has no effect.
"$python" -c 'import site; print(site.getsitepackages()[0])' > "$site/dependencies.pth"

cp -r tests/smoke "$outside/smoke"
cd "$outside"
LOWTIDE_CHECKOUT=$checkout "$outside/venv/bin/python" -m pytest -q -p no:cacheprovider -W error \
    --rootdir "$outside/smoke" smoke
