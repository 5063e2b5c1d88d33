"""Reads the body of a request as JSON, inside limits of bytes and time."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NoReturn

from lowtide.cli.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

BODY_SECONDS = 30.0
"""How long a client may take to send its body."""


async def read_json(request: Request, max_bytes: int) -> Any:
    """Return the parsed body; raises `ApiError` where it is too large, too slow or no JSON."""
    try:
        data = await asyncio.wait_for(_read(request, max_bytes), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_SECONDS:.0f} s: send it in one go",
            code="timeout",
            headers={"Connection": "close"},
        ) from None
    return parsed(data)


async def _read(request: Request, max_bytes: int) -> bytes:
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(data)


def parsed(data: bytes) -> Any:
    """Return the JSON value of a body."""
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


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than the {max_bytes:,} bytes that this server reads: send less, or raise --max-body",
        code="body_too_large",
        headers={"Connection": "close"},
    )
