"""Tools for models whose chat template knows none: they are described in the system message.

Calls and results in the history become text, in the form that the model is asked to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowtide.models.chat_template import Message
from lowtide.models.template.call_format import STYLES, CallFormat
from lowtide.runtime.tools.tool import Tool

_INSTRUCTION = """You can call functions. Each line describes one:
{tools}

To call a function, answer with its name and its arguments as JSON, and nothing else:
{example}"""


def with_tools(
    messages: Sequence[Message], tools: Sequence[Tool], form: CallFormat
) -> list[dict[str, Any]]:
    """Return the messages with the tools in the system message, and with calls and results as text."""
    changed: list[dict[str, Any]] = []
    for message in messages:
        plain = _plain(message, form)
        if changed and plain["role"] == changed[-1]["role"] == "user":
            # Many templates want turns to alternate, and results are the user's.
            plain = {"role": "user", "content": f"{changed.pop()['content']}\n{plain['content']}"}
        changed.append(plain)
    if not tools:
        return changed
    described = "\n".join(
        json.dumps(tool.to_dict()["function"], **STYLES["pretty"]) for tool in tools
    )
    example = f"{form.prefix}NAME{form.middle}{{...}}{form.suffix}"
    instruction = _INSTRUCTION.format(tools=described, example=example)
    if changed and changed[0]["role"] in ("system", "developer"):
        first = {**changed[0], "content": f"{changed[0]['content']}\n\n{instruction}"}
        return [first, *changed[1:]]
    return [{"role": "system", "content": instruction}, *changed]


def _plain(message: Message, form: CallFormat) -> dict[str, Any]:
    """Return a message as one of a chat without tools."""
    role, content = message.get("role"), _text(message.get("content"))
    if role in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls") or ()
    if not calls:
        return {**message, "content": content}
    written = [_written(call, form) for call in calls]
    text = "\n".join([content, *written] if content else written)
    return {"role": role, "content": text}


def _written(call: Mapping[str, Any], form: CallFormat) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, **STYLES["pretty"])
    return f"{form.prefix}{function.get('name')}{form.middle}{arguments}{form.suffix}"


def _text(content: Any) -> str:
    if isinstance(content, (list, tuple)):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)
