"""Computing in the background: on a thread that runs only where nobody else wants the core."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
LOWEST = 19


def take_lowest_priority() -> None:
    """Give the calling thread, and the threads that it starts, the lowest priority that the system has.

    Where the system has priorities of processes alone, as macOS, nothing changes: the process is the caller's.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
    with contextlib.suppress(OSError):  # it yields to every thread of another policy at once
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class BackgroundThread:
    """A thread of the lowest priority that calls functions, one after the other, for callers that wait."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="lowtide-background", initializer=take_lowest_priority
        )

    def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return the function's result; where the caller is interrupted, the function ends before it goes on."""
        future = self._executor.submit(function, *arguments)
        try:
            return future.result()
        except BaseException:
            future.exception()
            raise

    def close(self) -> None:
        """End the thread; closing twice is allowed."""
        self._executor.shutdown(wait=True)
