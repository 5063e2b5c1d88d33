"""Reads the bodies of requests as JSON, inside limits of bytes, values and time."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NoReturn

from lowtide.cli.server.errors import SERVER, ApiError
from lowtide.cli.server.settings import MAX_VALUES

if TYPE_CHECKING:
    from starlette.requests import Request

BODY_SECONDS = 30.0
"""How long a client may take to send its body."""
BODIES = 4
"""All bodies that are being read have at most so many times the bytes of the largest."""


class BodyReader:
    """Reads bodies of at most `max_bytes` each."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    async def read_json(self, request: Request) -> Any:
        """Return the parsed body; raises `ApiError` where it is too large, too slow or no JSON."""
        try:
            data = await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {BODY_SECONDS:.0f} s: send it in one go",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        return parsed(data)

    async def _read(self, request: Request) -> bytes:
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > self._max_bytes:
            raise self._too_large()
        data = bytearray()
        try:
            async for piece in request.stream():
                data += piece
                self._held_bytes += len(piece)
                if len(data) > self._max_bytes:
                    raise self._too_large()
                if self._held_bytes > BODIES * self._max_bytes:
                    raise _busy()
            return bytes(data)
        finally:
            self._held_bytes -= len(data)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than the {self._max_bytes:,} bytes that this server reads: send less, or raise "
            "--max-body",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _busy() -> ApiError:
    return ApiError(
        503,
        "the server reads other large requests: send this one again",
        code="busy",
        kind=SERVER,
        headers={"Retry-After": "1", "Connection": "close"},
    )


def parsed(data: bytes) -> Any:
    """Return the JSON value of a body."""
    if data.count(b"[") + data.count(b"{") + data.count(b'"') // 2 > MAX_VALUES:
        raise ApiError(
            413,
            f"the body has more than {MAX_VALUES:,} lists, objects and texts: send fewer",
            code="body_too_large",
        )
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:  # a constant, or a number with thousands of digits
        reason = str(error).split(";")[0]
    raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
