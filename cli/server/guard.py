"""Guard: looks at every request before anything else does: Host, Origin, key, and how fast its reader is.

A web page of any site can send requests to a server on this machine. A name of that site that points here (DNS
rebinding) has another Host, and a script of the page sends its Origin.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.json_answer import json_bytes
from lowtide.cli.server.settings import ServerSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ANSWERS = "lowtide.answers"
"""Where a request's scope has its answers, which end with it."""
OWNER = "lowtide.owner"
"""Where a request's scope says whose it is: clients share what the cache holds only where they have the same key."""
OPEN_PATHS = ("/", "/health", "/favicon.ico")
"""Paths that need no key: they tell nothing of models or requests."""
WRITE_SECONDS = 60.0
"""A client that reads nothing for so long is dropped."""


class Guard:
    """An ASGI application in front of another."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        try:
            self._check_host(headers.get("host", ""))
            self._check_origin(origin, headers.get("host", ""))
            if scope["method"] == "OPTIONS" and origin is not None:
                await _answer(send, 204, b"", self._cors(origin, is_preflight=True))
                return
            scope[OWNER] = self._owner(scope["path"], headers)
        except ApiError as error:
            await _answer(
                send, error.status, json_bytes(error.to_dict()), [*_JSON, *self._cors(origin)]
            )
            return
        more = [*_SAFE, *self._cors(origin)]

        async def checked_send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *more]
            await asyncio.wait_for(send(message), WRITE_SECONDS)

        try:
            await self._app(scope, receive, checked_send)
        finally:
            answers = scope.get(ANSWERS)
            if answers is not None:  # also where the client left before its stream began
                answers.close()

    def _check_host(self, host: str) -> None:
        if not self._settings.is_own_host(host):
            raise ApiError(
                421,
                "the request's Host is not a name of this server: use its address, or start lowtide serve with "
                "--allow-host",
                code="wrong_host",
            )

    def _check_origin(self, origin: str | None, host: str) -> None:
        """Refuse a script of another site, also where it could not read the answer."""
        if origin is None or origin in self._settings.cors_origins:
            return
        if _host_of(origin) != host.strip().lower():
            raise ApiError(
                403,
                "the request comes from a web page of another origin: start lowtide serve with --cors-origin for it",
                code="foreign_origin",
            )

    def _owner(self, path: str, headers: dict[str, str]) -> str:
        """Return the number of the key that a request has, "" where it needs none."""
        keys = self._settings.api_keys
        if not keys or path in OPEN_PATHS:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # All keys are compared, so that the time does not tell which one is nearly right.
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if not any(matches):
            raise ApiError(
                401,
                "the request has no key of this server: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return str(matches.index(True))

    def _cors(self, origin: str | None, *, is_preflight: bool = False) -> list[tuple[bytes, bytes]]:
        if origin is None or origin not in self._settings.cors_origins:
            return []
        found = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
        if is_preflight:
            found += [
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
                (b"access-control-max-age", b"600"),
            ]
        return found


def _host_of(origin: str) -> str | None:
    """Return host and port of an origin; None where it is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # as of http://[
        return None


_JSON = [(b"content-type", b"application/json")]
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, length, *_SAFE]}
    )
    await send({"type": "http.response.body", "body": body})
