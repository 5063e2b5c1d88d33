"""The endpoints of ollama's protocol, for clients that speak no other."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lowtide.cli.server.json_answer import json_answer, json_bytes
from lowtide.cli.server.ollama.answers import OllamaAnswer, OllamaRequest
from lowtide.cli.server.reading.fields import Fields
from lowtide.cli.server.service import Service
from lowtide.cli.server.streaming import SSE_HEADERS, with_errors


class OllamaEndpoints:
    """Answers requests under `/api`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        service = self._service
        asked = OllamaRequest.of_chat(
            await service.body(request),
            service.defaults,
            service.runtime.plan.context,
            service.call_syntax,
        )
        return await self._answer(request, asked, is_chat=True)

    async def generate(self, request: Request) -> Response:
        """Answer a text."""
        service = self._service
        asked = OllamaRequest.of_generate(
            await service.body(request), service.defaults, service.runtime.plan.context
        )
        return await self._answer(request, asked, is_chat=False)

    async def _answer(self, request: Request, asked: OllamaRequest, *, is_chat: bool) -> Response:
        service = self._service
        writer = OllamaAnswer(service.require_model(_untagged(asked.model)), is_chat=is_chat)
        answers = await service.ask(
            request,
            [asked.prompt],
            [asked.params],
            template_arguments=asked.template_arguments,
            tools=asked.tools,
        )
        if asked.stream:
            lines = with_errors(
                writer.stream(answers),
                lambda error: json_bytes({"error": error.message}) + b"\n",
            )
            return StreamingResponse(lines, media_type="application/x-ndjson", headers=SSE_HEADERS)
        (answer,) = await service.collect(request, answers)
        return json_answer(writer.whole(answer))

    async def tags(self, _request: Request) -> Response:
        """List the models."""
        return json_answer({"models": [self._values()]})

    async def show(self, request: Request) -> Response:
        """Describe one model."""
        fields = Fields(await self._service.body(request))
        self._service.require_model(_untagged(fields.text("model") or fields.text("name")))
        spec = self._service.runtime.spec
        values = self._values()
        return json_answer(
            {
                "details": values["details"],
                "template": spec.chat_template or "",
                "model_info": {
                    "general.architecture": spec.architecture,
                    f"{spec.architecture}.context_length": spec.context_length,
                },
                "capabilities": ["completion", "tools"],
            }
        )

    async def version(self, _request: Request) -> Response:
        """Return lowtide's version."""
        import lowtide

        return json_answer({"version": lowtide.__version__})

    def _values(self) -> dict[str, Any]:
        service = self._service
        spec = service.runtime.spec
        began = datetime.fromtimestamp(service.started_at, timezone.utc)
        return {
            "name": service.name,
            "model": service.name,
            "modified_at": began.isoformat().replace("+00:00", "Z"),
            "size": spec.file_bytes,
            "digest": spec.fingerprint or "",
            "details": {
                "format": spec.engine,
                "family": spec.architecture,
                "families": [spec.architecture],
                "parameter_size": "",
                "quantization_level": spec.quantisation,
            },
        }


def _untagged(name: str | None) -> str | None:
    """Return a model's name without ollama's tag, which its clients add."""
    return None if name is None else name.removesuffix(":latest")
