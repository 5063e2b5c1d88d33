"""Releaser: something that can give memory back on request, and from which level on.

The levels, from the mildest: "background" gives back what nobody uses, "moderate" also what can be had
again from where it came, "complete" also what must be computed or read again before the next token.
Knows no owner's insides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lowtide.memory.process import read_resident_bytes
from lowtide.models.errors import BadOption

LEVELS = ("background", "moderate", "complete")


@dataclass(frozen=True, slots=True)
class Reclaimer:
    """`release` gives something back and changes no answer; `level` is the mildest that calls it."""

    level: str
    release: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Trim:
    """What a trim did: `freed_bytes` is the resident set before less that after, 0 where it grew."""

    level: str
    freed_bytes: int


def trim(reclaimers: Iterable[Reclaimer], level: str) -> Trim:
    """Call the releasers of `level` and of the milder ones, in order. Raises `BadOption` for no level."""
    if level not in LEVELS:
        raise BadOption(f"level is {level!r}, one of {', '.join(LEVELS)} is wanted")
    before = read_resident_bytes()
    called = LEVELS[: LEVELS.index(level) + 1]
    for reclaimer in reclaimers:
        if reclaimer.level in called:
            reclaimer.release()
    return Trim(level, max(before - read_resident_bytes(), 0))
