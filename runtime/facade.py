"""lowtide: quantised language models inside a memory budget that you state in bytes.

Installed as the package's `__init__`. Knows no implementation: every name is imported when it is
first used, so that `import lowtide` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.runtime import (
        Delta,
        DeltaBlocks,
        Dense,
        FakeModel,
        Gem,
        GenerationOptions,
        GenerationResult,
        LowtideError,
        MemoryPlan,
        OverBudget,
        Piece,
        Profiler,
        PromptTooLong,
        Runtime,
        Statistics,
        Tidal,
    )

    __version__: str

__all__ = [
    "Delta",
    "DeltaBlocks",
    "Dense",
    "FakeModel",
    "Gem",
    "GenerationOptions",
    "GenerationResult",
    "LowtideError",
    "MemoryPlan",
    "OverBudget",
    "Piece",
    "Profiler",
    "PromptTooLong",
    "Runtime",
    "Statistics",
    "Tidal",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lowtide")
    if name in __all__:
        return getattr(importlib.import_module("lowtide.runtime"), name)
    raise AttributeError(f"module 'lowtide' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
