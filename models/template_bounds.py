"""Allowance: how much one rendering of a chat template may still do. Knows no jinja2 syntax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.models.errors import TemplateError

MAX_SOURCE = 64 << 10
"""Characters of a template; the longest in use have a third of that."""
MAX_STEPS = 100_000
"""Loop turns, and items of lists counted as often as they are nested, in one rendering."""
MAX_TEXT = 4 << 20
"""Characters that one operation, or the prompt itself, may have."""
MAX_TOTAL_TEXT = 64 << 20
"""Characters that all operations of one rendering may read and make together."""


class TooMuch(TemplateError):
    """The template passed one of the bounds, or asked for what none allows."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}: it is refused")


class Allowance:
    """Counts what a rendering does; raises `TooMuch` before what would pass a bound is done."""

    def __init__(self) -> None:
        self._steps = 0
        self._text = 0

    def step(self) -> None:
        """Count a turn of a loop."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooMuch(f"loops or nests more than {MAX_STEPS:,} times")

    def make(self, length: int) -> None:
        """Count a text of `length` characters."""
        self._text += length
        if length > MAX_TEXT or self._text > MAX_TOTAL_TEXT:
            raise TooMuch(f"makes a text of more than {MAX_TEXT:,} characters")

    def weigh(self, value: Any) -> None:
        """Count every item that printing or comparing the value would visit."""
        waiting = [value]
        while waiting:
            self.step()
            item = waiting.pop()
            if isinstance(item, str):
                self.make(len(item))
            elif isinstance(item, Mapping):
                waiting += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                waiting += item
            elif type(item).__name__ == "Namespace":
                raise TooMuch("prints or nests a namespace")
