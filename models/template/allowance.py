"""Allowance: what one rendering may do, counted; it grows with the conversation, so that long ones never meet it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jinja2.utils import Namespace

from lowtide.models.errors import TemplateError

MAX_SOURCE = 64 << 10
"""The most characters of a template; the longest in use have a third of that."""
MAX_STEPS = 100_000
"""The most calls, loop iterations and (nested) list items of one rendering, of a conversation without messages."""
MAX_TEXT = 4 << 20
"""The most characters of the result of one operation, and of the prompt, of a conversation without texts."""
MAX_TOTAL_TEXT = 64 << 20
"""The most characters that all operations of one rendering read and make together, of one without texts."""
MAX_MESSAGE_STEPS = 20_000_000
"""The most steps more, for templates that look at all messages for each message."""
MAX_REPEATED_TEXT = 32 << 20
"""The most characters more, for templates that print something with each message."""
MAX_BITS = 512
"""The most bits of a whole number."""


class TooMuch(TemplateError):
    """The template exceeded one of the limits or used something that is not allowed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}, which is not allowed")


class Allowance:
    """Counts what one rendering does; raises `TooMuch` before an operation that would exceed a limit.

    `num_messages` messages allow that each one looks at all others. `num_items` values and `num_characters` of text
    allow that each is visited several times and goes on into every longer text.
    """

    def __init__(self, num_messages: int = 0, num_items: int = 0, num_characters: int = 0) -> None:
        quadratic = min(16 * num_messages**2, MAX_MESSAGE_STEPS)
        self._max_steps = MAX_STEPS + 64 * num_items + 2 * num_characters + quadratic
        self._max_text = MAX_TEXT + 8 * num_characters
        self._max_text += min(num_messages * num_characters, MAX_REPEATED_TEXT)
        self._max_total = MAX_TOTAL_TEXT + (64 + 8 * num_messages) * num_characters
        self._steps = 0
        self._text = 0
        self._sizes: dict[int, tuple[Any, int, int]] = {}

    def step(self, times: int = 1) -> None:
        """Count loop iterations, calls or items of a list."""
        self._steps += times
        if self._steps > self._max_steps:
            raise TooMuch(f"loops or nests more than {self._max_steps:,} times")

    def make(self, length: int) -> None:
        """Count a text of `length` characters."""
        self._text += length
        if length > self._max_text or self._text > self._max_total:
            raise TooMuch(f"makes a text of more than {self._max_text:,} characters")

    def check_printed(self, length: int) -> None:
        """Refuse a prompt of more characters than one operation may make."""
        if length > self._max_text:
            raise TooMuch(f"prints more than {self._max_text:,} characters")

    def visit(self, value: Any) -> None:
        """Count an operation that reads the value with everything nested in it."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            items, characters = self._size(value)
            self.step(items)
            self.make(characters)

    def nest(self, value: Any) -> Any:
        """Return a new container, counted; refuse one with too many values nested in it."""
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self.step(len(value))
            self._size(value)
        return value

    def _size(self, container: Any) -> tuple[int, int]:
        """Return how many values the container holds at all depths, and their characters.

        Containers cannot change in the sandbox, so each is counted once.
        """
        known = self._sizes.get(id(container))
        if known is not None:
            return known[1], known[2]
        items, characters = 1, 0
        for item in _items(container):
            if isinstance(item, str):
                items, characters = items + 1, characters + len(item)
            elif isinstance(item, (Mapping, list, tuple, set, frozenset)):
                inner_items, inner_characters = self._size(item)
                items, characters = items + inner_items, characters + inner_characters
            else:
                items += 1
        if items > self._max_steps:
            raise TooMuch(f"loops or nests more than {self._max_steps:,} times")
        self._sizes[id(container)] = container, items, characters
        return items, characters


def _items(container: Any) -> Iterable[Any]:
    if isinstance(container, Mapping):
        yield from container
        yield from container.values()
    else:
        yield from container


def refuse_namespaces(value: Any) -> None:
    """Refuse to print a namespace, which may hold itself."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Namespace):
            raise TooMuch("prints a namespace")
        if isinstance(item, (Mapping, list, tuple, set, frozenset)):
            pending += _items(item)
