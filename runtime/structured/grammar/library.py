"""llguidance, which is optional (`lowtide[structured]`) and imported when the first constraint is made."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lowtide.models.errors import BadOption

LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Limits of the library's work, some times above what the largest of 172 schemas of JSONSchemaBench needs."""


def llguidance() -> Any:
    """Import the library; raises `BadOption` where it is not installed."""
    if find_spec("llguidance") is None:
        raise BadOption(
            "structured output needs the package llguidance, which is not installed: "
            "pip install 'lowtide[structured]'"
        )
    import llguidance

    return llguidance
