"""The libraries of the extra `onnx`, imported when needed; without them an error names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from lowtide.models.errors import UnsupportedModel

EXTRA = "pip install 'lowtide[onnx]'"


def onnx_library(name: str) -> Any:
    """Return the module `name`; raises `UnsupportedModel` with what to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedModel(
            f"ONNX models need {name.partition('.')[0]}, which cannot be imported ({error}): {EXTRA}"
        ) from None
