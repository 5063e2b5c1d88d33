"""Watchdog: reads the resident set between passes and releases memory before the budget is exceeded.

The plan keeps the budget; the watchdog is for what no plan knows, such as a host program that grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lowtide.memory.budget import WATCHED_SHARE
from lowtide.memory.process import read_resident_bytes
from lowtide.memory.reclaim import Reclaimed

INTERVAL_S = 0.02
"""Least seconds between two readings. A reading takes 10 to 20 microseconds: below 0.1 % of the time."""
STEP_SHARE = 1 / 64
"""Share of the budget by which the resident set must grow before memory is released again: what was released may be
used again at once, and releasing at every pass would be slow."""
ANSWER_LEVELS = ("background", "moderate")
"""The levels that leave a running answer what it needs, in the order in which they are tried."""


class Watchdog:
    """Watches the resident set during one generation. `trim` releases memory at a level."""

    def __init__(self, budget_bytes: int, trim: Callable[[str], Reclaimed]) -> None:
        self._budget_bytes = budget_bytes
        self._watched_bytes = self._next_bytes = int(budget_bytes * WATCHED_SHARE)
        self._trim = trim
        self._next_reading = 0.0
        self._freed_bytes: dict[str, int] = {}

    @property
    def trims(self) -> tuple[Reclaimed, ...]:
        """What was released so far, one value for each level that was tried."""
        return tuple(Reclaimed(level, num_bytes) for level, num_bytes in self._freed_bytes.items())

    def is_over(self) -> bool:
        """Return whether the process is over the budget although memory was released.

        Reads the resident set at most every `INTERVAL_S` seconds, and returns False in between.
        """
        now = time.monotonic()
        if now < self._next_reading:
            return False
        self._next_reading = now + INTERVAL_S
        found_bytes = resident_bytes = read_resident_bytes()
        if found_bytes < self._next_bytes:
            return False
        for level in ANSWER_LEVELS:
            if resident_bytes >= self._watched_bytes:
                freed_bytes = self._trim(level).freed_bytes
                self._freed_bytes[level] = self._freed_bytes.get(level, 0) + freed_bytes
                resident_bytes = read_resident_bytes()
        step_bytes = int(self._budget_bytes * STEP_SHARE)
        self._next_bytes = min(found_bytes + step_bytes, self._budget_bytes + 1)
        return resident_bytes > self._budget_bytes
