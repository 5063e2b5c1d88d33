"""Checks the messages of a chat request: roles, texts, calls of tools and their results."""

from __future__ import annotations

import json
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.reading.fields import Fields
from lowtide.models.arguments.values import shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def take_messages(fields: Fields, name: str = "messages") -> list[dict[str, Any]]:
    """Return the messages as the chat template gets them."""
    found = fields.list(name)
    if not found:
        raise ApiError(
            400,
            f"{fields.path(name)} is empty; it must have at least one message",
            param=fields.path(name),
            code="invalid_value",
        )
    return [
        _message(Fields(one, f"{fields.path(name)}.{i}"), fields.path(name))
        for i, one in enumerate(found)
    ]


def _message(fields: Fields, where: str) -> dict[str, Any]:
    role = fields.choice("role", ROLES)
    if role is None:
        raise ApiError(
            400,
            f"{fields.path('role')} is missing; it must be one of {', '.join(ROLES)}",
            param=where,
        )
    calls = _calls(fields) if role == "assistant" else []
    content = text_of_parts(fields.take("content"), fields.path("content"), may_lack=bool(calls))
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        value = fields.text(key)
        if value is not None:
            message[key] = value
    fields.ignore("annotations", "function_call" if role != "assistant" else "")
    fields.refuse(
        {
            "refusal": "models read texts alone: send it as the content",
            "audio": "lowtide reads text alone",
            "function_call": "it is the old form of tool_calls: send those",
        }
    )
    fields.finish(["role", "content", "name", "tool_calls", "tool_call_id"])
    return message


def text_of_parts(value: Any, where: str, *, may_lack: bool = False) -> str | None:
    """Return a content as one text; a list of text parts is joined as clients mean it, by line ends."""
    if value is None:
        if may_lack:
            return None
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ApiError(
            400,
            f"{where} is {shown(value)}; it must be a text or a list of text parts",
            param=where,
        )
    return "\n".join(_text_of_part(part, f"{where}.{i}") for i, part in enumerate(value))


def _text_of_part(part: Any, where: str) -> str:
    fields = Fields(part, where)
    kind = fields.take("type")
    if kind not in ("text", "input_text", "output_text"):
        raise ApiError(
            400,
            f"{where} is of the type {shown(kind)}, but lowtide reads text alone: send parts of the type text",
            param=where,
            code="unsupported_content",
        )
    text = fields.text("text")
    if text is None:
        raise ApiError(400, f"{where}.text is missing", param=where)
    return text


def _calls(fields: Fields) -> list[dict[str, Any]]:
    calls = fields.list("tool_calls") or []
    return [_call(Fields(one, f"{fields.path('tool_calls')}.{i}")) for i, one in enumerate(calls)]


def _call(fields: Fields) -> dict[str, Any]:
    function = fields.object("function")
    name = function.text("name") if function is not None else None
    if function is None or not name:
        raise ApiError(
            400,
            f"{fields.path('function')} must have the name of the function",
            param=fields.path("function"),
        )
    arguments = function.take("arguments")
    if isinstance(arguments, str):
        # Templates want objects, clients send texts: what is no object stays the text that it is.
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif arguments is None:
        arguments = {}
    called: dict[str, Any] = {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    call_id = fields.text("id")
    return called if call_id is None else {"id": call_id, **called}
