"""Connection: HTTP/1.1 with deadlines: a client that sends slowly is dropped, and every refusal can be read.

uvicorn waits for ever for the rest of a request, and answers malformed HTTP with plain text. It also closes a
connection whose client still sends: the system then resets it, and the client loses the answer that says why.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowtide.cli.server.errors import SERVER, ApiError
from lowtide.cli.server.json_answer import json_bytes

HEAD_SECONDS = 15.0
"""How long a client may take to send the head of a request."""
REST_SECONDS = 40.0
"""How long it may take for the body, whether anybody reads it or not; `BodyReader` answers earlier."""
LINGER_SECONDS = 5.0
"""How long what a refused client still sends is read and dropped, so that it reads the answer."""


class Connection(H11Protocol):
    """One connection of a client; `max_connections` is set by `connection_class`."""

    max_connections = 128

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse the connection where there are too many."""
        self._deadline: asyncio.TimerHandle | None = None
        self._phase: str | None = None
        self._lingers = self._is_refused = False
        self._has_received = False
        super().connection_made(_Lingering(transport, self))
        if len(self.connections) > self.max_connections:
            self._refuse(
                ApiError(
                    503,
                    f"the server has {self.max_connections} connections already: close some, or come again",
                    code="too_many_connections",
                    kind=SERVER,
                    headers={"Retry-After": "1"},
                )
            )
        else:
            self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._enter(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent, and look how far its request is."""
        if self._lingers:
            return
        self._has_received = True
        super().data_received(data)
        phases = {h11.IDLE: "head", h11.SEND_BODY: "body"}
        self._enter(phases.get(self.conn.their_state))

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP/1.1, or has too large a head."""
        message = "the request is not HTTP/1.1 as this server reads it, or its head is too large"
        self._refuse(ApiError(400, message, code="invalid_http"))

    @property
    def is_sending(self) -> bool:
        """Whether the client may still send what belongs to its request."""
        is_in_head = self._phase == "head" and self._has_received
        return self._is_refused or is_in_head or self.conn.their_state is h11.SEND_BODY

    def linger(self) -> None:
        """Drop what comes from now on."""
        self._lingers = True
        self._enter(None)

    def cut(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def _enter(self, phase: str | None) -> None:
        """Start the deadline of a phase: that of the head, or of the body; None has none."""
        if self._lingers:
            phase = None
        if phase == self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if phase is not None:
            seconds = HEAD_SECONDS if phase == "head" else REST_SECONDS
            self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._phase != "head" or not self._has_received:
            self.cut()
            return
        message = (
            f"the head of the request did not arrive within {HEAD_SECONDS:.0f} s: send it in one go"
        )
        self._refuse(ApiError(408, message, code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Write an error without any request, and close."""
        self._is_refused = True
        body = json_bytes(error.to_dict())
        head = [
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(f"{name.lower()}: {value}" for name, value in error.headers.items()),
        ]
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        self.transport.close()


class _Lingering(asyncio.Transport):
    """A transport that closes without a reset: the client's side is read until it ends, or for some seconds."""

    def __init__(self, inner: asyncio.Transport, connection: Connection) -> None:
        super().__init__()
        self._inner, self._connection = inner, connection
        self._is_closing = False

    def close(self) -> None:
        """Close, at once where the client has sent all."""
        if self.is_closing():
            return
        self._is_closing = True
        if not self._connection.is_sending:
            self._inner.close()
            return
        self._connection.linger()
        try:
            self._inner.write_eof()
            self._inner.resume_reading()
        except (OSError, RuntimeError):
            self._inner.close()
            return
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._inner.abort)

    def abort(self) -> None:
        self._is_closing = True
        self._inner.abort()

    def is_closing(self) -> bool:
        return self._is_closing or self._inner.is_closing()

    def write(self, data: Any) -> None:
        self._inner.write(data)

    def pause_reading(self) -> None:
        if not self._is_closing:
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)


def connection_class(max_connections: int) -> type[asyncio.Protocol]:
    """Return the class of connections of a server that has at most so many."""
    made = type("LimitedConnection", (Connection,), {"max_connections": max_connections})
    return cast("type[asyncio.Protocol]", made)
