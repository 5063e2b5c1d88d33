"""Reclaimer: releases memory on request, at one of three levels of memory pressure.

"background" releases what nobody uses, "moderate" also what can be fetched or computed again later, and
"complete" also what must be read or computed again before the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lowtide.memory.process import read_resident_bytes
from lowtide.models.arguments.values import choice

LEVELS = ("background", "moderate", "complete")
"""From the mildest to the strongest."""


@dataclass(frozen=True, slots=True)
class Reclaimer:
    """`release_pages` frees memory and changes no answer; `level` is the mildest level that calls it."""

    level: str
    release_pages: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The result of `reclaim`: `freed_bytes` is how much the resident set shrank, 0 if it grew."""

    level: str
    freed_bytes: int


def reclaim(reclaimers: Iterable[Reclaimer], level: str) -> Reclaimed:
    """Call the reclaimers of `level` and of the milder levels, in order.

    Raises `BadOption` if `level` is not one of `LEVELS`.
    """
    choice("level", level, LEVELS)
    before = read_resident_bytes()
    called = LEVELS[: LEVELS.index(level) + 1]
    for reclaimer in reclaimers:
        if reclaimer.level in called:
            reclaimer.release_pages()
    return Reclaimed(level, max(before - read_resident_bytes(), 0))
