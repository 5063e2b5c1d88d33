from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import lowtide


def test_every_exported_name_exists() -> None:
    assert dir(lowtide) == sorted(lowtide.__all__)
    for name in lowtide.__all__:
        assert getattr(lowtide, name) is not None


def test_versions_agree() -> None:
    assert lowtide.__version__ == version("lowtide")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Llama'"):
        lowtide.Llama  # noqa: B018


def test_importing_lowtide_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import lowtide;"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "jinja2", "click", "rich", "llama_cpp", "psutil", "ctypes"}
    assert heavy.isdisjoint(eval(done.stdout))


@pytest.mark.parametrize("folder", ["runtime", "memory", "attention", "models", "cli"])
def test_folders_are_never_importable_bare(folder: str, tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        capture_output=True,
        text=True,
        cwd=str(tmp_path),
    )
    assert "ModuleNotFoundError" in done.stderr
