"""ActiveGeneration: one generation of a runtime at a time, step by step, also when several threads call.

It holds the lock of everything that touches the loaded model: forward passes, tokenising, saving, trimming, and
freeing. Whoever needs the model enters `between_steps`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from lowtide.runtime.errors import RuntimeUnusable

T = TypeVar("T")
_open: weakref.WeakSet[ActiveGeneration] = weakref.WeakSet()


def collect_dropped() -> None:
    """Collect runtimes and embedders that were dropped without `close`: they give their memory back now."""
    if _open:
        gc.collect()


class ActiveGeneration:
    """Knows which generation may go on: starting another ends the one before with an error.

    A step, which is one forward pass, is never interrupted: `between_steps` waits for the one that runs. `free` frees
    the model, which errors call `name`; `close` calls it once, when no step runs. A forked child has the memory of the
    model but none of the threads that compute with it, so there everything raises.
    """

    def __init__(self, free: Callable[[], None], name: str = "runtime") -> None:
        self._free, self._name = free, name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._model_lock = threading.RLock()
        self._turn = threading.RLock()  # a signal handler may close while its thread waits
        self._owner: int | None = None
        self._depth = 0
        self._number = 0
        self._is_closed = self._is_freed = False
        _open.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def is_forked(self) -> bool:
        """Whether this process is a forked child of the one that loaded the model."""
        return os.getpid() != self._pid

    def close_dropped(self, model: str, owner: object) -> None:
        """Close for an owner that is collected without `close`, with a `ResourceWarning`; not in a forked child."""
        if self._is_closed or self.is_forked or sys.is_finalizing():
            return
        article = "an" if self._name[0] in "aeiou" else "a"
        warnings.warn(
            f"{article} {self._name} of {model} was not closed",
            ResourceWarning,
            stacklevel=3,
            source=owner,
        )
        self.close()

    def start(self) -> int:
        """Start a generation and return its number. Raises `RuntimeUnusable` after `close` and in a forked child."""
        self.require_open()
        with self._lock:
            self._number += 1
            return self._number

    def is_current(self, number: int) -> bool:
        """Return whether the runtime is open and no other generation was started since."""
        return number == self._number and not self._is_closed

    def require_open(self) -> None:
        """Raise `RuntimeUnusable` after `close` and in a forked child."""
        if self.is_forked:
            raise RuntimeUnusable(
                f"process {self._pid} opened this {self._name}, and process {os.getpid()} was forked from it without "
                "the threads that compute: open one in the child, or start it with spawn"
            )
        if self._is_closed:
            raise RuntimeUnusable(f"the {self._name} is closed; open it again")

    def require_current(self, number: int) -> None:
        """Raise `RuntimeUnusable` after `close` and where another generation was started."""
        self.require_open()
        if not self.is_current(number):
            raise RuntimeUnusable("this answer was ended by another answer or by a complete trim")

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Wait for the step that runs; none starts while the block runs.

        Raises `RuntimeUnusable` where the runtime is closed.
        """
        self.require_open()
        with self._alone():
            self.require_open()
            yield

    def run(self, number: int, steps: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield what `steps` yields while generation `number` may go on, and close it at the end."""
        try:
            while True:
                self.require_current(number)
                with self._alone():
                    self.require_current(number)
                    try:
                        value = next(steps)
                    except StopIteration:
                        return
                yield value
        finally:
            if not self.is_forked:
                with self._alone():
                    steps.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._in_turn():
            self._depth += 1
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                self._free_if_closed()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Hold the lock; a thread that makes step after step lets those that wait for it go first."""
        if self._owner == threading.get_ident():
            with self._model_lock:
                yield
            return
        with self._turn:
            self._model_lock.acquire()
        try:
            yield
        finally:
            self._model_lock.release()

    def close(self) -> None:
        """End everything for good, and free the model when the step that runs is done.

        Closing again, from any thread, waits for the first close. From inside a step, as a signal handler does it, the
        model is freed at the end of that step. In a forked child nothing is freed: that would wait for threads that
        are not there.
        """
        if self.is_forked:
            return
        _open.discard(self)
        self._is_closed = True  # first, so that the running answer makes no further step
        with self._in_turn():
            self._free_if_closed()

    def _free_if_closed(self) -> None:
        if self._is_closed and not self._is_freed and self._depth == 0:
            self._is_freed = True
            self._free()
