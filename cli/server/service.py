"""Service: what the endpoints share: the model, its defaults, the metrics, and how an answer is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lowtide.cli.server.errors import SERVER, ApiError, api_error
from lowtide.cli.server.guard import ANSWERS, OWNER
from lowtide.cli.server.metrics import Metrics
from lowtide.cli.server.reading.body import BodyReader
from lowtide.cli.server.settings import ServerSettings
from lowtide.cli.server.streaming import Answers, Pending
from lowtide.models.arguments.values import shown
from lowtide.models.chat_template import Message
from lowtide.runtime.errors import QueueFull
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.runtime import Runtime
from lowtide.runtime.serving.deltas import Answer, CallDeltas, Delta, delta_of
from lowtide.runtime.tools.use import ToolUse

if TYPE_CHECKING:
    from starlette.requests import Request

    from lowtide.runtime.embedding.passes import Vectors

IDLE_S = 0.02
"""How often an embedding that waits for an answer looks whether that has ended."""
Found = TypeVar("Found")
Reader = Callable[[GenerationChunk], Delta]


class Service:
    """Answers requests with one model, which clients call `name`; `defaults` are for what a request leaves out."""

    def __init__(
        self, runtime: Runtime, name: str, defaults: SamplingParams, settings: ServerSettings
    ) -> None:
        self.runtime = runtime
        self.name = name
        self.defaults = defaults
        self.settings = settings
        self.metrics = Metrics()
        self._embedding = asyncio.Lock()
        self._bodies = BodyReader(settings.max_body_bytes)
        self._open: set[Answers] = set()
        self.call_syntax = runtime.call_syntax
        self.started_at = int(time.time())

    async def body(self, request: Request) -> Any:
        """Return the parsed body of a request."""
        return await self._bodies.read_json(request)

    def require_model(self, name: str | None) -> str:
        """Return the name of the model that a request asks for; none is the one that there is."""
        if name in (None, self.name):
            return self.name
        raise ApiError(
            404,
            f"there is no model {shown(name)} here: ask for {self.name}",
            param="model",
            code="model_not_found",
        )

    async def ask(
        self,
        request: Request,
        prompts: Sequence[str | Sequence[Message]],
        params: Sequence[SamplingParams],
        *,
        template_arguments: Mapping[str, Any] | None = None,
        tools: ToolUse | None = None,
    ) -> Answers:
        """Ask for an answer to each prompt, and wait a moment for the first token.

        What cannot be answered raises `ApiError`: before a stream begins, where that shows at once. The answers end
        with the request.
        """
        if self.runtime.queue.sequences == 1:
            async with self._embedding:  # it would end an answer of the model's only sequence
                pass
        self._require_place()
        pending: list[Pending] = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                pending.append(
                    self.runtime.submit(
                        prompt,
                        each,
                        tools=tools,
                        template_arguments=template_arguments,
                        owner=request.scope[OWNER],
                    )
                )
        except Exception as error:
            for one in pending:
                one.cancel()
            raise api_error(error) from error
        readers = [self._counted(_reader(tools)) for _ in pending]
        answers = Answers(pending, readers, self._open.discard)
        self._open.add(answers)
        request.scope[ANSWERS] = answers
        await self._unless_left(request, answers.begin())
        return answers

    def _require_place(self) -> None:
        """Refuse a request where clients leave many answers unread: those take memory until they are."""
        queue = self.runtime.queue
        if len(self._open) > 2 * queue.sequences + queue.max_waiting:
            raise QueueFull(queue.waiting, queue.retry_after_s)

    def end_answers(self) -> None:
        """End all answers because the server stops."""
        error = ApiError(
            503,
            "the server stops before the answer is complete: ask again when it has started again",
            code="server_stops",
            kind=SERVER,
            headers={"Connection": "close"},
        )
        for answers in list(self._open):
            answers.fail(error)

    async def embed(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Return the vectors of texts and the number of their tokens, computed when the model is free for it."""

        def compute() -> tuple[Vectors, int]:
            return self.runtime.embed(texts), sum(map(self.runtime.count_tokens, texts))

        async with self._embedding:
            while self.runtime.queue.sequences == 1 and self.runtime.queue.running:
                await asyncio.sleep(IDLE_S)
            return await asyncio.to_thread(compute)

    def _counted(self, read: Reader) -> Reader:
        def counted(chunk: GenerationChunk) -> Delta:
            delta = read(chunk)
            if delta.finish is not None:
                self.metrics.count_answer(delta.finish)
            return delta

        return counted

    async def collect(self, request: Request, answers: Answers) -> list[Answer]:
        """Return whole answers; a client that leaves ends them."""
        try:
            return await self._unless_left(request, answers.all())
        except ApiError:
            raise
        except Exception as error:
            raise api_error(error) from error
        finally:
            answers.close()

    async def _unless_left(self, request: Request, waiting: Coroutine[Any, Any, Found]) -> Found:
        """Return what is waited for; raises `ApiError` as soon as the client has closed its connection."""
        found = asyncio.create_task(waiting)
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({found, left}, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                self.metrics.num_cancelled += 1
                raise ApiError(499, "the client left", code="cancelled")
            return found.result()
        finally:
            left.cancel()
            found.cancel()


def _reader(tools: ToolUse | None) -> Reader:
    calls = tools.reader() if tools is not None else None
    return delta_of if calls is None else CallDeltas(calls)


async def _left(request: Request) -> None:
    """Return when the client has closed its connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
