"""ActiveGeneration: one generation of a runtime at a time, step by step, also when several threads call."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import TypeVar

from lowtide.runtime.errors import RuntimeUnusable

T = TypeVar("T")


class ActiveGeneration:
    """Knows which generation may go on: starting another ends the one before with an error.

    A step, which is one forward pass, is never interrupted: `between_steps` waits for the one that runs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stepping = threading.RLock()
        self._number = 0
        self._is_closed = False

    def start(self) -> int:
        """Start a generation and return its number. Raises `RuntimeUnusable` after `close`."""
        with self._lock:
            self.require_open()
            self._number += 1
            return self._number

    def is_current(self, number: int) -> bool:
        """Return whether no other generation was started since."""
        return number == self._number

    def require_open(self) -> None:
        """Raise `RuntimeUnusable` after `close`."""
        if self._is_closed:
            raise RuntimeUnusable("the runtime is closed; open it again")

    def require_current(self, number: int) -> None:
        """Raise `RuntimeUnusable` after `close` and where another generation was started."""
        self.require_open()
        if not self.is_current(number):
            raise RuntimeUnusable("this answer was ended by another answer or by a complete trim")

    def between_steps(self) -> AbstractContextManager[object]:
        """Return a block in which no step runs."""
        return self._stepping

    def run(self, number: int, steps: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield what `steps` yields while generation `number` may go on, and close it at the end."""
        try:
            while True:
                with self._stepping:
                    self.require_current(number)
                    try:
                        value = next(steps)
                    except StopIteration:
                        return
                yield value
        finally:
            steps.close()

    def close(self) -> bool:
        """End everything for good; return False if that was so before."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            return not was_closed
