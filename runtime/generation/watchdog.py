"""Watchdog: looks at the resident set between steps and gives memory back before the budget is passed.

The plan keeps the budget; this is for what no plan knows, such as a host program that grows. Knows no
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lowtide.memory.budget import WATCHED_SHARE
from lowtide.memory.process import read_resident_bytes
from lowtide.memory.reclaim import Reclaimed

INTERVAL_S = 0.02
"""A look costs 10 to 20 microseconds: at most this often it is below 0.1 % of the time."""
STEP_SHARE = 1 / 64
"""Of the budget: how much more must be resident before it is tried again. What was given back may be taken
again at once, and giving it back at every step would be slow."""
DURING_AN_ANSWER = ("background", "moderate")
"""The levels that leave a running answer what it needs, in the order that they are tried."""


class Watchdog:
    """Watches one answer. `trim` gives memory back at a level."""

    def __init__(self, budget_bytes: int, trim: Callable[[str], Reclaimed]) -> None:
        self._budget_bytes = budget_bytes
        self._watched_bytes = self._next_bytes = int(budget_bytes * WATCHED_SHARE)
        self._trim = trim
        self._look_at = 0.0
        self._given_back: dict[str, int] = {}

    @property
    def trims(self) -> tuple[Reclaimed, ...]:
        """What was given back so far, a value for each level that was tried."""
        return tuple(Reclaimed(level, num_bytes) for level, num_bytes in self._given_back.items())

    def is_over(self) -> bool:
        """Whether the process is over the budget after all that may be given back was.

        Looks only now and then, and says no in between.
        """
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + INTERVAL_S
        found_bytes = resident_bytes = read_resident_bytes()
        if found_bytes < self._next_bytes:
            return False
        for level in DURING_AN_ANSWER:
            if resident_bytes >= self._watched_bytes:
                freed_bytes = self._trim(level).freed_bytes
                self._given_back[level] = self._given_back.get(level, 0) + freed_bytes
                resident_bytes = read_resident_bytes()
        step_bytes = int(self._budget_bytes * STEP_SHARE)
        self._next_bytes = min(found_bytes + step_bytes, self._budget_bytes + 1)
        return resident_bytes > self._budget_bytes
