"""Which values of a template hold text of a message, and what becomes of values that are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Undefined

from lowtide.models.template.traced_text import TracedText

_WITHOUT_TEXT = (bool, int, float, type(None), Undefined, range)


def holds_message(value: Any) -> bool:
    """Whether text that a message brought is in the value. Objects of unknown kinds count as if it were."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, TracedText):
            return True
        if isinstance(item, Mapping):
            pending += item
            pending += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += item
        elif not isinstance(item, (str, *_WITHOUT_TEXT)):
            return True
    return False
