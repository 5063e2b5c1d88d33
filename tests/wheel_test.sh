#!/usr/bin/env bash
# The tests against the built wheel, outside the checkout: what users install is what is tested.
# $PYTHON is a Python whose environment has the dependencies and the tools.
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
# The dependencies are borrowed. A path line runs no hooks: the editable install stays behind.
"$python" -c 'import site; print(site.getsitepackages()[0])' > "$site/dependencies.pth"

cp -r tests "$outside/tests"
cp pyproject.toml README.md "$outside/"
cd "$outside"
"$outside/venv/bin/python" - "$checkout" <<'PY'
import sys, pathlib, lowtide.runtime, lowtide.attention.bindings.library as native
checkout = pathlib.Path(sys.argv[1])
for path in (*lowtide.__path__, *lowtide.runtime.__path__, native.native_library()._name):
    home = pathlib.Path(path).resolve()
    assert checkout not in home.parents or ".venv" in home.parts, f"{path} is in the checkout"
    assert "venv/lib" in str(home) and ".venv" not in home.parts, f"{path} is not from the wheel"
PY
"$outside/venv/bin/python" -m pytest -q -p no:cacheprovider -m "not benchmark and not once"
