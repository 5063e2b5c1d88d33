"""The ASGI application: which path is answered by what, and how errors look."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from lowtide.cli.server.errors import ApiError, api_error
from lowtide.cli.server.guard import App, Guard
from lowtide.cli.server.json_answer import json_answer
from lowtide.cli.server.ollama.endpoints import OllamaEndpoints
from lowtide.cli.server.openai.endpoints import OpenAIEndpoints
from lowtide.cli.server.page.page import PAGE_HEADERS, page_text
from lowtide.cli.server.service import Service
from lowtide.cli.server.status import status_gauges, status_values

Endpoint = Callable[[Request], Awaitable[Response]]
log = logging.getLogger("lowtide.server")


def make_app(service: Service) -> App:
    """Return the application that answers with `service`."""
    openai, ollama, own = OpenAIEndpoints(service), OllamaEndpoints(service), _Own(service)
    paths: tuple[tuple[str, str, Endpoint], ...] = (
        ("POST", "/v1/chat/completions", openai.chat),
        ("POST", "/v1/completions", openai.completions),
        ("POST", "/v1/responses", openai.responses),
        ("POST", "/v1/embeddings", openai.embeddings),
        ("GET", "/v1/models", openai.models),
        ("GET", "/v1/models/{name:path}", openai.model),
        ("POST", "/api/chat", ollama.chat),
        ("POST", "/api/generate", ollama.generate),
        ("POST", "/api/show", ollama.show),
        ("GET", "/api/tags", ollama.tags),
        ("GET", "/api/version", ollama.version),
        ("GET", "/", own.page),
        ("GET", "/status", own.status),
        ("GET", "/health", own.health),
        ("GET", "/metrics", own.metrics),
    )
    app = Starlette(
        routes=[
            Route(path, _counted(service, path, endpoint), methods=[method])
            for method, path, endpoint in paths
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_mistake},
    )
    return Guard(app, service.settings)


class _Own:
    """The page, and the endpoints for whoever runs the server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(page_text(), headers=PAGE_HEADERS)

    async def status(self, _request: Request) -> Response:
        return json_answer(status_values(self._service))

    async def health(self, _request: Request) -> Response:
        return json_answer({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        text = self._service.metrics.text(status_gauges(self._service))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _counted(service: Service, path: str, endpoint: Endpoint) -> Endpoint:
    """Return the endpoint with its answers counted, and its errors in the form of its protocol."""

    async def counted(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except Exception as error:
            failed = api_error(error)
            service.metrics.count_request(path, failed.status)
            if failed.code == "internal_error":
                log.exception("an internal error in %s", path)
            return error_response(failed, path)
        service.metrics.count_request(path, response.status_code)
        return response

    return counted


def error_response(error: ApiError, path: str) -> Response:
    """Return an error as the clients of a path read it."""
    body = {"error": error.message} if path.startswith("/api/") else error.to_dict()
    return json_answer(body, error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Any) -> Response:
    what = {
        404: "there is no such path here; the API is at /v1",
        405: "this path has another method",
    }
    message = what.get(error.status_code, str(error.detail))
    return error_response(
        ApiError(error.status_code, message, code="no_such_path"), request.url.path
    )


async def _on_mistake(request: Request, error: Any) -> Response:
    return error_response(api_error(error), request.url.path)
