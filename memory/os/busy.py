"""How busy the machine is with the work of others.

Linux tells how many threads run or wait for a core at this moment (the fourth number of /proc/loadavg). One look costs
a few microseconds, so it is worth one before each forward pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from math import exp
from pathlib import Path

from lowtide.memory.machine import PROC, usable_cores

SECONDS = 0.1
"""Over about how long a time the number is averaged: shorter than what a reader notices, longer than what the many
small jobs of an idle machine take."""
MARGIN = 0.6
"""How far the average must be from the number that is believed before another one is: it changes neither to and fro
nor for a short job."""


class OtherWork:
    """How many threads of others compete for the cores, on average over the last moments.

    It is asked between forward passes, when only the asking thread of this process runs. `spare_cores` are cores of
    the machine that this process may not use: work of others fills them first. Where the system does not tell, as
    outside Linux, there is no other work.
    """

    def __init__(
        self,
        spare_cores: int = 0,
        proc: Path = PROC,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spare_cores = spare_cores
        self._clock = clock
        self._average: float | None = None
        self._believed = 0
        self._asked_at = 0.0
        try:
            self._file: int | None = os.open(proc / "loadavg", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def threads(self) -> int:
        """Return how many threads of others compete for the cores of this process."""
        runnable = self._runnable()
        if runnable is None:
            return 0
        now, others = self._clock(), max(runnable - 1 - self._spare_cores, 0)
        if self._average is None:
            self._average = float(others)
        else:
            weight = 1 - exp(-(now - self._asked_at) / SECONDS)
            self._average += weight * (others - self._average)
        self._asked_at = now
        if abs(self._average - self._believed) > MARGIN:
            self._believed = round(self._average)
        return self._believed

    def _runnable(self) -> int | None:
        if self._file is None:
            return None
        try:
            return int(os.pread(self._file, 128, 0).split()[3].partition(b"/")[0])
        except (OSError, ValueError, IndexError):
            return None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def other_work() -> OtherWork:
    """Return the other work on this machine."""
    return OtherWork(spare_cores=max((os.cpu_count() or 1) - usable_cores(), 0))
