"""The endpoints of OpenAI's protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lowtide.cli.server.json_answer import json_answer
from lowtide.cli.server.openai.chat import ChatAnswer, ChatRequest
from lowtide.cli.server.openai.completions import CompletionAnswer, CompletionRequest
from lowtide.cli.server.openai.embeddings import EmbeddingRequest
from lowtide.cli.server.openai.responses import ResponseAnswer, ResponseRequest
from lowtide.cli.server.service import Service
from lowtide.cli.server.status import model_values
from lowtide.cli.server.streaming import SSE_HEADERS, event, with_errors


class OpenAIEndpoints:
    """Answers requests under `/v1`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        service = self._service
        asked = ChatRequest.of(await service.body(request), service.defaults, service.call_syntax)
        model, params = service.require_model(asked.model), asked.params_of_each()
        answers = await service.ask(
            request,
            [asked.messages] * len(params),
            params,
            template_arguments=asked.template_arguments,
            tools=asked.tools,
        )
        writer = ChatAnswer(
            model,
            with_logprobs=asked.params.logprobs is not None,
            include_usage=asked.include_usage,
        )
        if asked.stream:
            return streamed(writer.stream(answers, len(params)))
        return json_answer(writer.whole(await service.collect(request, answers)))

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        service = self._service
        asked = CompletionRequest.of(await service.body(request), service.defaults)
        model = service.require_model(asked.model)
        prompts, params = asked.each()
        answers = await service.ask(request, prompts, params)
        writer = CompletionAnswer(model, asked, prompts)
        if asked.stream:
            return streamed(writer.stream(answers))
        return json_answer(writer.whole(await service.collect(request, answers)))

    async def responses(self, request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's responses."""
        service = self._service
        asked = ResponseRequest.of(
            await service.body(request), service.defaults, service.call_syntax
        )
        model = service.require_model(asked.model)
        answers = await service.ask(
            request,
            [asked.messages],
            [asked.params],
            template_arguments=asked.template_arguments,
            tools=asked.tools,
        )
        writer = ResponseAnswer(model, asked)
        if asked.stream:
            return streamed(writer.stream(answers))
        (answer,) = await service.collect(request, answers)
        return json_answer(writer.whole(answer))

    async def embeddings(self, request: Request) -> Response:
        """Embed texts."""
        service = self._service
        asked = EmbeddingRequest.of(await service.body(request))
        model = service.require_model(asked.model)
        vectors, num_tokens = await service.embed(asked.texts)
        return json_answer(asked.answer(model, vectors, num_tokens))

    async def models(self, _request: Request) -> Response:
        """List the models."""
        return json_answer({"object": "list", "data": [model_values(self._service)]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self._service.require_model(request.path_params["name"])
        return json_answer(model_values(self._service))


def streamed(parts: AsyncIterator[bytes]) -> Response:
    """Return server-sent events; an error behind the beginning is the last of them."""
    return StreamingResponse(
        with_errors(parts, lambda error: event(error.to_dict())),
        media_type="text/event-stream",
        headers=SSE_HEADERS,
    )
