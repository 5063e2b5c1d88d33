"""Which instruction sets this processor lacks, before code that needs them is loaded."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable

X86 = ("x86_64", "AMD64")


def missing_features(names: Iterable[str]) -> list[str]:
    """Return those of `names` (numpy's names of x86 instruction sets) that this x86 processor lacks.

    Other processors lack none: the names do not apply to them.
    """
    if platform.machine() not in X86:
        return []
    features = _cpu_features()
    return [name for name in names if not features.get(name, True)]


def _cpu_features() -> dict[str, bool]:
    """Return what numpy found with the processor's own instruction, as no system call reports it."""
    try:
        core = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # numpy 1
        core = importlib.import_module("numpy.core._multiarray_umath")
    features: dict[str, bool] = getattr(core, "__cpu_features__", {})
    return features
