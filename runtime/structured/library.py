"""llguidance, which is optional (`lowtide[structured]`) and imported when the first constraint is made."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lowtide.models.errors import BadOption


def llguidance() -> Any:
    """Import the library; raises `BadOption` where it is not installed."""
    if find_spec("llguidance") is None:
        raise BadOption(
            "structured output needs the package llguidance, which is not installed: "
            "pip install 'lowtide[structured]'"
        )
    import llguidance

    return llguidance
