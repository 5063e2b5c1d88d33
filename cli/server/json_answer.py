"""JSON of answers and errors: UTF-8 in one line, whatever texts a request had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in one line, without blanks; a "?" is in place of half a surrogate pair.

    JSON's escapes can write such a half, which is no character, and an error may quote it from its request.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def json_answer(
    value: Any, status: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer of one JSON value."""
    return Response(json_bytes(value), status, headers=headers, media_type="application/json")
