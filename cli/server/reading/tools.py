"""Reads the tools of a request, and which of them the answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowtide.cli.server.errors import ApiError, api_error
from lowtide.cli.server.reading.fields import Fields
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.use import CHOICES, ToolUse


def take_tools(
    fields: Fields, syntax: CallSyntax, messages: Sequence[dict[str, Any]]
) -> ToolUse | None:
    """Return the use of tools; None where the request has none, and its messages no calls."""
    tools, choice = fields.list("tools") or [], take_choice(fields)
    several = fields.flag("parallel_tool_calls", default=True)
    if choice not in (None, "auto", "none") and not tools:
        raise ApiError(400, "tool_choice needs tools: send some", param="tool_choice")
    has_history = any(one["role"] == "tool" or one.get("tool_calls") for one in messages)
    if not tools and not has_history:
        return None
    for i, tool in enumerate(tools):
        _check(Fields(tool, f"tools.{i}"))
    try:
        return ToolUse(syntax, tools, choice or "auto", several=several)
    except BadOption as error:
        param = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise api_error(error, param) from None


def _check(fields: Fields) -> None:
    fields.choice("type", ["function"])
    function = fields.object("function") or fields
    for name in ("name", "description"):
        function.text(name)
    function.ignore("parameters", "strict")
    function.finish(["name", "description", "parameters"])
    fields.finish(["type", "function"])


def take_choice(fields: Fields, name: str = "tool_choice") -> str | None:
    """Return "auto", "none", "required", or the name of a tool; None where the request says nothing."""
    value = fields.take(name)
    if value is None:
        return None
    if isinstance(value, str):
        if value in CHOICES:
            return value
        raise ApiError(
            400, f"{name} is {shown(value)}; it must be one of {', '.join(CHOICES)}", param=name
        )
    stated = Fields(value, name)
    if stated.choice("type", ["function"]) is None:
        raise ApiError(400, f"{name}.type is missing; it must be function", param=name)
    function = stated.object("function") or stated
    called = function.text("name")
    function.finish(["name"])
    stated.finish(["type", "function"])
    if not called:
        raise ApiError(400, f"{name}.function.name is missing", param=name)
    return called
