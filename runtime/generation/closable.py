"""ClosableGenerator: a generator that any thread may close, also while another one waits for its next value."""

from __future__ import annotations

import threading
from collections.abc import Generator
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class ClosableGenerator(Generator[T, None, None]):
    """Yields what `steps` yields, one thread at a time.

    `close` waits for the step that another thread makes, and ends the generator behind it; that thread gets the step's
    value, and then the end. Closing from inside a step, as a signal handler does it, ends the generator with that step.
    A plain generator raises ValueError in these cases.
    """

    def __init__(self, steps: Generator[T, None, None]) -> None:
        self._steps = steps
        self._lock = threading.RLock()
        self._is_running = self._is_closed = False

    def send(self, value: None) -> T:
        """Return the next value."""
        with self._lock:
            if self._is_running:
                raise RuntimeError(
                    "an answer was continued from inside its own step: do that behind it"
                )
            self._is_running = True
            try:
                return self._steps.send(value)
            finally:
                self._is_running = False
                if self._is_closed:
                    self._steps.close()

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> T:
        """Raise an exception where the generator waits."""
        with self._lock:
            if isinstance(kind, BaseException):
                return self._steps.throw(kind)
            return self._steps.throw(value if isinstance(value, BaseException) else kind())

    def close(self) -> None:
        """End the generator; returns when no step runs, or at once inside a step."""
        self._is_closed = True
        with self._lock:
            if not self._is_running:
                self._steps.close()
