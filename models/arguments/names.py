"""How an option is written in a message: `top_p` for a caller in Python, `--top-p` on the command line.

An error is made where a value is wrong, far below the command line. It names options with `option`, which asks
whoever started the work how they are written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Spelling = Callable[[str], str | None]
"""Returns how the command line writes an option, and None for an option that it does not have."""

_spelling: ContextVar[Spelling | None] = ContextVar("spelling", default=None)


@contextmanager
def on_command_line(spelling: Spelling) -> Iterator[None]:
    """Have the messages that are made inside the block name options as `spelling` writes them."""
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def option(name: str, value: object = None) -> str:
    """Return how the caller writes the option `name`, with a value where one is passed.

    In Python `attention='tidal'`, on the command line `--attention tidal`; True is `repack=True` or `--repack`.
    """
    spelling = _spelling.get()
    written = spelling(name) if spelling is not None else None
    if written is None:
        return name if value is None else f"{name}={value!r}"
    return written if value is None or value is True else f"{written} {value}"
