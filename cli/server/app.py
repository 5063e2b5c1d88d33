"""The ASGI application: which path is answered by what, and how errors look."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lowtide.cli.server.chat import ChatAnswer, ChatRequest
from lowtide.cli.server.errors import ApiError, api_error
from lowtide.cli.server.guard import App, Guard
from lowtide.cli.server.service import Service
from lowtide.cli.server.status import model_values, status_gauges
from lowtide.cli.server.streaming import SSE_HEADERS, event, with_errors

Endpoint = Callable[[Request], Awaitable[Response]]
log = logging.getLogger("lowtide.server")


def make_app(service: Service) -> App:
    """Return the application that answers with `service`."""
    endpoints = Endpoints(service)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
    ]
    app = Starlette(
        routes=[
            Route(r.path, _counting(service, r.path, r.endpoint), methods=r.methods) for r in routes
        ],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            Exception: _on_mistake,
        },
    )
    return Guard(app, service.settings)


class Endpoints:
    """The endpoints of OpenAI's protocol, and those for whoever runs the server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        service = self._service
        asked = ChatRequest.of(await service.body(request), service.defaults, service.call_syntax)
        model = service.require_model(asked.model)
        params = asked.params_of_each()
        answers = await service.ask(
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
        return JSONResponse(writer.whole(await service.collect(request, answers)))

    async def models(self, _request: Request) -> Response:
        """List the models."""
        return JSONResponse({"object": "list", "data": [model_values(self._service)]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self._service.require_model(request.path_params["name"])
        return JSONResponse(model_values(self._service))

    async def health(self, _request: Request) -> Response:
        """Say that the server answers."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """Return the metrics in Prometheus's text format."""
        text = self._service.metrics.text(status_gauges(self._service))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def streamed(parts: AsyncIterator[bytes]) -> Response:
    """Return server-sent events; an error behind the beginning is the last of them."""
    return StreamingResponse(
        with_errors(parts, lambda error: event(error.to_dict())),
        media_type="text/event-stream",
        headers=SSE_HEADERS,
    )


def _counting(service: Service, path: str, endpoint: Any) -> Endpoint:
    async def counted(request: Request) -> Response:
        try:
            response: Response = await endpoint(request)
        except Exception as error:
            failed = api_error(error)
            service.metrics.count_request(path, failed.status)
            if failed.code == "internal_error":
                log.exception("an internal error in %s", path)
            return error_response(failed)
        service.metrics.count_request(path, response.status_code)
        return response

    return counted


def error_response(error: ApiError) -> Response:
    """Return an error as clients read it."""
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


async def _on_api_error(_request: Request, error: Any) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: Any) -> Response:
    what = {
        404: "there is no such path here; the API is at /v1",
        405: "this path has another method",
    }
    return error_response(
        ApiError(
            error.status_code, what.get(error.status_code, str(error.detail)), code="no_such_path"
        )
    )


async def _on_mistake(_request: Request, error: Any) -> Response:
    return error_response(api_error(error))
