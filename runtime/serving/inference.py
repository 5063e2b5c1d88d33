"""Inference: the one thread that computes with a runtime, and the queue of what it is asked for.

llama.cpp's contexts are not for several threads, and an event loop must not wait for one. Requests are answered in the
order in which they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from lowtide.models.chat_template import Message
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.runtime import Runtime
from lowtide.runtime.serving.errors import QueueFull

T = TypeVar("T")
Start = Callable[[Runtime], Generator[GenerationChunk, None, None]]


class Submission:
    """An answer that is asked for: an asynchronous iterator of its chunks, for one event loop."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[GenerationChunk | BaseException | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the answer: before its next token, or before it is begun."""
        self._cancelled.set()

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> GenerationChunk:
        item = await self._arrived.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def run(self, runtime: Runtime) -> None:
        """Compute the answer, on the thread of inference."""
        try:
            if not self.is_cancelled:
                with contextlib.closing(self._start(runtime)) as chunks:
                    for chunk in chunks:
                        self._send(chunk)
                        if self._cancelled.is_set():
                            break
            self._send(None)
        except BaseException as error:
            self._send(error)

    def _send(self, item: GenerationChunk | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)
        except RuntimeError:  # the event loop has ended
            self._cancelled.set()


class Inference:
    """Runs a model on a thread of its own. At most `max_waiting` requests wait beside the one that runs."""

    def __init__(self, open_runtime: Callable[[], Runtime], max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[Callable[[Runtime], None]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_running = False
        self._seconds_each = 1.0
        opened: Future[Runtime] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(open_runtime, opened), name="lowtide inference", daemon=True
        )
        self._thread.start()
        self.runtime = opened.result()

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests are computed."""
        return int(self._is_running)

    def submit(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Submission:
        """Ask for an answer: to messages, or the continuation of a text. Raises `QueueFull`."""

        def start(runtime: Runtime) -> Generator[GenerationChunk, None, None]:
            if isinstance(prompt, str):
                return runtime.stream(prompt, params)
            return runtime.chat(prompt, params, tools=tools, template_arguments=template_arguments)

        submission = Submission(start)
        self._enqueue(submission.run)
        return submission

    async def call(self, work: Callable[[Runtime], T]) -> T:
        """Return what `work` returns, which is called on the thread of inference in its turn."""
        result: Future[T] = Future()

        def run(runtime: Runtime) -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(work(runtime))
            except BaseException as error:
                result.set_exception(error)

        self._enqueue(run)
        return await asyncio.wrap_future(result)

    def _enqueue(self, run: Callable[[Runtime], None]) -> None:
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(len(self._waiting), self._seconds_each)
            self._waiting.append(run)
            self._changed.notify()

    def _work(self, open_runtime: Callable[[], Runtime], opened: Future[Runtime]) -> None:
        try:
            runtime = open_runtime()
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(runtime)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed and not self._waiting:
                    break
                run = self._waiting.popleft()
                self._is_running = True
            started = time.monotonic()
            run(runtime)
            self._is_running = False
            self._seconds_each += 0.2 * (time.monotonic() - started - self._seconds_each)
        runtime.close()

    def close(self) -> None:
        """Finish what waits, and free the model."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
