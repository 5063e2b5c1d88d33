"""`/v1/responses`: OpenAI's newer protocol, without a memory of earlier responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.openai.chat import VERBOSITY, own_values, take_template_arguments
from lowtide.cli.server.reading.fields import Fields
from lowtide.cli.server.reading.messages import ROLES, text_of_parts
from lowtide.cli.server.reading.parameters import SAMPLING, sampling_of, take_format, take_sampling
from lowtide.cli.server.reading.tools import take_tools
from lowtide.cli.server.streaming import KEEP_ALIVE, Answers, event
from lowtide.models.arguments.values import shown
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.serving.deltas import Answer, Call, Finish
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.use import CHOICES, ToolUse

IGNORED = (
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention truncation "
    "stream_options max_tool_calls"
).split()
STATEFUL = "lowtide stores no responses: send the whole conversation as input"
REFUSED = {
    "previous_response_id": STATEFUL,
    "conversation": STATEFUL,
    "prompt": "lowtide has no stored prompts",
    "include": "there is nothing to include",
    "reasoning": "it has no meaning for every model: use chat_template_kwargs",
    "top_logprobs": "use /v1/chat/completions for log probabilities",
}


@dataclass(frozen=True, kw_only=True)
class ResponseRequest:
    """A checked request for a response."""

    model: str | None
    messages: list[dict[str, Any]]
    params: SamplingParams
    stream: bool
    tools: ToolUse | None
    template_arguments: dict[str, Any] | None

    @classmethod
    def of(cls, body: Any, base: SamplingParams, syntax: CallSyntax) -> ResponseRequest:
        """Read a request; raises `ApiError` for what is wrong, unknown or not supported."""
        fields = Fields(body)
        if fields.take("truncation") not in (None, "disabled"):
            raise ApiError(400, "truncation must be disabled: see overflow", param="truncation")
        fields.ignore(*IGNORED)
        fields.refuse(REFUSED)
        fields.only("background", False, STATEFUL)
        model, messages = fields.text("model"), _take_input(fields)
        instructions = fields.text("instructions")
        if instructions is not None:
            messages = [{"role": "system", "content": instructions}, *messages]
        values = take_sampling(fields, base, length_fields=("max_output_tokens",))
        text = fields.object("text")
        format = None
        if text is not None:
            format = take_format(text, "format")
            text.only("verbosity", "medium", VERBOSITY)
            text.finish(["format"])
        asked = cls(
            model=model,
            messages=messages,
            params=sampling_of(base, values, format),
            stream=fields.flag("stream"),
            tools=take_tools(fields, syntax, messages),
            template_arguments=take_template_arguments(fields),
        )
        fields.finish([*SAMPLING, *"input instructions max_output_tokens text tools".split()])
        return asked


def _take_input(fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ApiError(
            400, f"input is {shown(value)}; it must be a text or a list of items", param="input"
        )
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        _add(messages, Fields(item, f"input.{i}"))
    return messages


def _add(messages: list[dict[str, Any]], fields: Fields) -> None:
    """Append an item of the input; calls join the message of the assistant before them."""
    kind = fields.choice("type", ("message", "function_call", "function_call_output")) or "message"
    fields.ignore("status")
    if kind == "message":
        fields.ignore("id")
        role = fields.choice("role", ROLES)
        content = text_of_parts(
            _without_annotations(fields.take("content")), fields.path("content")
        )
        if role is None:
            raise ApiError(400, f"{fields.path('role')} is missing", param=fields.path("role"))
        messages.append({"role": role, "content": content})
    elif kind == "function_call":
        fields.ignore("id")
        function = {"name": fields.text("name"), "arguments": fields.text("arguments") or "{}"}
        call = {"id": fields.text("call_id"), "type": "function", "function": function}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    else:
        fields.ignore("id")
        output = text_of_parts(fields.take("output"), fields.path("output"))
        messages.append({"role": "tool", "tool_call_id": fields.text("call_id"), "content": output})
    fields.finish(["type", "role", "content", "name", "arguments", "call_id", "output"])


def _without_annotations(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {key: item for key, item in part.items() if key not in ("annotations", "logprobs")}
        if isinstance(part, dict)
        else part
        for part in content
    ]


class ResponseAnswer:
    """Writes one response, whole or as events."""

    def __init__(self, model: str, asked: ResponseRequest) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._use = asked.tools
        self._number = 0

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the response as one object."""
        return self._response(answer)

    def _response(self, answer: Answer, status: str | None = None) -> dict[str, Any]:
        finish = answer.finish
        is_cut = finish is not None and finish.reason == "length"
        output: list[dict[str, Any]] = []
        if answer.text or (finish is not None and not answer.calls):
            output.append(self._message(answer.text, "incomplete" if is_cut else "completed"))
        output += [_call_item(call, "completed") for call in answer.calls]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": status or ("incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "output": output,
            **_tool_values(self._use),
            "usage": None if finish is None else _usage(finish),
            "lowtide": own_values([finish] if finish else []),
        }

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._message_id,
            "role": "assistant",
            "status": status,
            "content": [_part(text)] if text or status != "in_progress" else [],
        }

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        answer = Answer()
        yield self._event("created", response=self._response(answer, "in_progress"))
        yield self._event("in_progress", response=self._response(answer, "in_progress"))
        is_begun = False
        async for pair in answers.deltas():
            if pair is None:
                yield KEEP_ALIVE
                continue
            delta = pair[1]
            answer.add(delta)
            if delta.text:
                if not is_begun:
                    is_begun = True
                    item = self._message("", "in_progress")
                    yield self._event("output_item.added", output_index=0, item=item)
                    yield self._event("content_part.added", **self._at_text(), part=_part(""))
                yield self._event(
                    "output_text.delta", **self._at_text(), delta=delta.text, logprobs=[]
                )
            for call in delta.calls:
                at, item_id = call.index + is_begun, answer.calls[call.index].id
                if call.id is not None:
                    begun = _call_item(Call(call.id, call.name or ""), "in_progress")
                    yield self._event("output_item.added", output_index=at, item=begun)
                if call.arguments:
                    yield self._event(
                        "function_call_arguments.delta",
                        output_index=at,
                        item_id=item_id,
                        delta=call.arguments,
                    )
        for part in self._endings(answer, is_begun):
            yield part
        whole = self._response(answer)
        yield self._event(whole["status"], response=whole)

    def _endings(self, answer: Answer, has_text: bool) -> list[bytes]:
        parts: list[bytes] = []
        if has_text:
            at, item = self._at_text(), self._message(answer.text, "completed")
            parts += [
                self._event("output_text.done", **at, text=answer.text, logprobs=[]),
                self._event("content_part.done", **at, part=_part(answer.text)),
                self._event("output_item.done", output_index=0, item=item),
            ]
        for i, call in enumerate(answer.calls):
            at_call = {"output_index": i + has_text}
            parts += [
                self._event(
                    "function_call_arguments.done",
                    **at_call,
                    item_id=call.id,
                    name=call.name,
                    arguments=call.arguments,
                ),
                self._event("output_item.done", **at_call, item=_call_item(call, "completed")),
            ]
        return parts

    def _at_text(self) -> dict[str, Any]:
        return {"output_index": 0, "content_index": 0, "item_id": self._message_id}

    def _event(self, kind: str, **values: Any) -> bytes:
        name = f"response.{kind}"
        made = event({"type": name, "sequence_number": self._number, **values}, name)
        self._number += 1
        return made


def _tool_values(use: ToolUse | None) -> dict[str, Any]:
    """Return the fields of a response that repeat what was asked of tools."""
    if use is None:
        return {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    named = {"type": "function", "name": use.choice}
    tools = [tool.to_dict()["function"] for tool in use.tools]
    return {
        "parallel_tool_calls": use.several,
        "tool_choice": use.choice if use.choice in CHOICES else named,
        "tools": [{"type": "function", "strict": True, **tool} for tool in tools],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": call.id,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def _usage(finish: Finish) -> dict[str, Any]:
    stats = finish.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens},
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }
