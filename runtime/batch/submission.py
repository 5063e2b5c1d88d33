"""Submission: an answer that the runtime's own thread computes, for any thread or asyncio loop to read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lowtide.runtime.errors import AnswerCancelled
from lowtide.runtime.generation.result import GenerationChunk, GenerationResult

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True, slots=True, eq=False)
class _Sleeper:
    """A task that waits for the next chunk, or for the end."""

    loop: asyncio.AbstractEventLoop
    woken: asyncio.Future[None]
    until_end: bool


class Submission:
    """An answer that waits, is computed, or has ended. Made by `Runtime.submit`.

    Iterate over its chunks with `for` or `async for`, from the first one each time, or wait for the whole result with
    `result()` or `await`. What went wrong is raised there. Every method may be called from any thread.
    """

    def __init__(self, cancel: Callable[[], None], response_format: Any = None) -> None:
        self._cancel = cancel
        self._format = response_format
        self._chunks: list[GenerationChunk] = []
        self._error: Exception | None = None
        self._is_done = False
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._watchers: list[Callable[[], None]] = []
        self._sleepers: list[_Sleeper] = []

    @property
    def done(self) -> bool:
        """Whether the answer has ended: complete, cancelled, or with an error."""
        return self._is_done

    def cancel(self) -> None:
        """End the answer before the next forward pass; its room in the KV cache is free then.

        Waiting for it raises `AnswerCancelled`. Nothing happens where it has ended.
        """
        if not self._is_done:
            self._cancel()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the whole answer, at most `timeout` seconds; raises `TimeoutError` after these."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the answer was not complete after {timeout} s")
        return self._whole()

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        """Wait for the whole answer; it is cancelled where the task that waits is."""
        yield from self._changes(None).__await__()
        return self._whole()

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Yield the chunks as they come."""
        position = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self.has_news, position))
            if position == len(self._chunks):
                break
            yield self._chunks[position]
            position += 1
        self._require_whole()

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        """Yield the chunks as they come; the answer is cancelled where the task that waits is."""
        position = 0
        while True:
            await self._changes(position)
            if position == len(self._chunks):
                break
            yield self._chunks[position]
            position += 1
        self._require_whole()

    @property
    def error(self) -> Exception | None:
        """What ended the answer before it was complete; None where nothing did."""
        return self._error

    def chunks(self, position: int) -> list[GenerationChunk]:
        """Return the chunks so far from number `position` on."""
        return self._chunks[position:]

    def on_change(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` whenever a chunk came or the answer has ended; it must return at once."""
        with self._changed:
            self._watchers.append(watcher)

    def has_news(self, position: int) -> bool:
        """Whether there are more chunks than `position`, or the answer has ended."""
        return position < len(self._chunks) or self._is_done

    async def _changes(self, position: int | None) -> None:
        """Wait until there are more chunks than `position`, or until the end of the answer alone."""
        import asyncio  # only where somebody waits in a loop: starts are faster without it

        loop = asyncio.get_running_loop()
        with self._changed:
            if self._is_done or (position is not None and self.has_news(position)):
                return
            sleeper = _Sleeper(loop, loop.create_future(), until_end=position is None)
            self._sleepers.append(sleeper)
        try:
            await sleeper.woken
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _whole(self) -> GenerationResult:
        self._require_whole()
        return GenerationResult.of(self._chunks, self._format)

    def _require_whole(self) -> None:
        if self._error is not None:
            raise self._error

    def add_chunk(self, chunk: GenerationChunk) -> None:
        """Add a chunk; with a finish reason it is the last one. Called by the thread that computes."""
        with self._changed:
            if self._is_done:
                return
            self._chunks.append(chunk)
            self._is_done = chunk.finish_reason is not None
            self._wake()

    def fail(self, error: Exception) -> None:
        """End the answer with an error, unless it has ended."""
        with self._changed:
            if self._is_done:
                return
            self._error, self._is_done = error, True
            self._wake()

    def fail_cancelled(self) -> None:
        """End the answer because it was cancelled."""
        self.fail(AnswerCancelled("the answer was cancelled"))

    def _wake(self) -> None:
        """Wake who waits for the next chunk, and at the end everybody: each one costs time of the passes."""
        if self._is_done:
            self._ended.set()
        self._changed.notify_all()
        for watcher in self._watchers:
            watcher()
        woken = [one for one in self._sleepers if self._is_done or not one.until_end]
        self._sleepers = [one for one in self._sleepers if one not in woken]
        for one in woken:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                one.loop.call_soon_threadsafe(_wake_one, one.woken)


def read(submission: Submission) -> Generator[GenerationChunk, None, None]:
    """Yield the chunks of a submitted answer, which is cancelled where the generator is closed."""
    try:
        yield from submission
    finally:
        submission.cancel()


def read_all(
    submissions: Sequence[Submission],
) -> Generator[tuple[int, GenerationChunk], None, None]:
    """Yield the chunks of all submissions as they come, with the index of each; cancel those left where it is closed.

    Raises the first error when the others have ended.
    """
    changed = threading.Condition()
    positions, errors = [0] * len(submissions), list[Exception]()
    left = set(range(len(submissions)))

    def wake() -> None:
        with changed:
            changed.notify_all()

    for submission in submissions:
        submission.on_change(wake)
    try:
        while left:
            with changed:
                changed.wait_for(lambda: any(submissions[i].has_news(positions[i]) for i in left))
            for i in sorted(left):
                for chunk in submissions[i].chunks(positions[i]):
                    positions[i] += 1
                    yield i, chunk
                if submissions[i].done and not submissions[i].chunks(positions[i]):
                    left.discard(i)
                    error = submissions[i].error
                    errors += [] if error is None else [error]
    finally:
        for submission in submissions:
            submission.cancel()
    if errors:
        raise errors[0]


def _wake_one(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
