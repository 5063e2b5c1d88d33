"""Several answers as one stream of deltas, which tells when nothing came for a while, and server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from lowtide.cli.server.errors import ApiError, api_error
from lowtide.cli.server.json_answer import json_bytes
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.serving.deltas import Answer, Delta

PAUSE_S = 5.0
"""After so many seconds without a token a stream says that it is alive."""
PATIENCE_S = 1.0
"""How long an answer's first token is waited for before its stream begins; an error until then has its own status."""


class Pending(AsyncIterable[GenerationChunk], Protocol):
    """An answer that is computed somewhere: an asynchronous iterator of its chunks."""

    def cancel(self) -> None:
        """End it."""


class Answers:
    """The deltas of several answers as they come, as pairs of an answer's number and a delta; None for a pause.

    `readers` make deltas of chunks, one for each answer. Closing ends all answers, and calls `on_close` with them once.
    """

    def __init__(
        self,
        pending: Sequence[Pending],
        readers: Sequence[Callable[[GenerationChunk], Delta]],
        on_close: Callable[[Answers], None] = lambda _: None,
    ) -> None:
        self._pending = pending
        self._on_close: Callable[[Answers], None] | None = on_close
        self._arrived: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(64)
        self._tasks = [
            asyncio.create_task(self._pump(i, one, reader))
            for i, (one, reader) in enumerate(zip(pending, readers, strict=True))
        ]
        self._first: tuple[int, Delta | BaseException | None] | None = None

    async def _pump(
        self, index: int, pending: Pending, read: Callable[[GenerationChunk], Delta]
    ) -> None:
        try:
            async for chunk in pending:
                await self._arrived.put((index, read(chunk)))
            await self._arrived.put((index, None))
        except Exception as error:
            await self._arrived.put((index, error))

    def fail(self, error: ApiError) -> None:
        """End all answers with an error, behind what has come already."""
        for task in self._tasks:
            task.cancel()
        self._failing = asyncio.ensure_future(self._arrived.put((0, error)))

    async def begin(self) -> None:
        """Wait for the first delta, but not for long; raises the error that comes instead of one."""
        try:
            self._first = await asyncio.wait_for(self._arrived.get(), PATIENCE_S)
        except asyncio.TimeoutError:
            return
        if isinstance(self._first[1], BaseException):
            self.close()
            raise api_error(self._first[1])

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta] | None, None]:
        """Yield pairs of an answer's number and a delta, and None where nothing came for `PAUSE_S`."""
        num_left = len(self._tasks)
        try:
            while num_left:
                if self._first is not None:
                    (index, item), self._first = self._first, None
                else:
                    try:
                        index, item = await asyncio.wait_for(self._arrived.get(), PAUSE_S)
                    except asyncio.TimeoutError:
                        yield None
                        continue
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_left -= 1
                    continue
                yield index, item
        finally:
            self.close()

    async def all(self) -> list[Answer]:
        """Return the answers when all have ended."""
        answers = [Answer() for _ in self._tasks]
        async for pair in self.deltas():
            if pair is not None:
                answers[pair[0]].add(pair[1])
        return answers

    def close(self) -> None:
        """End all answers."""
        for task in self._tasks:
            task.cancel()
        for one in self._pending:
            one.cancel()
        if self._on_close is not None:
            self._on_close(self)
            self._on_close = None


def event(value: Any, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    head = f"event: {name}\n" if name else ""
    return head.encode() + b"data: " + json_bytes(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def with_errors(
    parts: AsyncIterator[bytes], failed: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    """Yield the parts of a stream; an error behind its beginning becomes the last part."""
    try:
        async for part in parts:
            yield part
    except Exception as error:
        yield failed(api_error(error))
