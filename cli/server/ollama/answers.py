"""ollama's protocol: `/api/chat` and `/api/generate`, as lines of JSON or whole."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.json_answer import json_bytes
from lowtide.cli.server.ollama.duration import is_duration, is_no_time
from lowtide.cli.server.reading.fields import Fields
from lowtide.cli.server.reading.messages import take_messages
from lowtide.cli.server.reading.parameters import sampling_of, take_sampling
from lowtide.cli.server.reading.tools import take_tools
from lowtide.cli.server.streaming import Answers
from lowtide.models.arguments.values import shown
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.serving.deltas import Answer, Call, Finish
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.use import ToolUse

IGNORED_OPTIONS = ("num_thread num_batch num_gpu main_gpu use_mmap use_mlock numa low_vram").split()
"""Options of a model that is loaded: the server's owner has set them."""
REFUSED = {
    "images": "lowtide reads text alone",
    "template": "the server's owner sets it, with --chat-template",
    "suffix": "lowtide continues texts at their end alone",
    "context": "send the whole conversation to /api/chat",
    "logprobs": "use /v1/chat/completions for log probabilities",
}
REFUSED_OPTIONS = {
    "num_keep": "set overflow to drop-oldest, which drops the oldest turns",
    "f16_kv": "the server's owner sets it, with --kv-type",
    "vocab_only": "the model is loaded whole",
}


@dataclass(frozen=True, kw_only=True)
class OllamaRequest:
    """A checked request: `messages` of a chat, or a text to continue as it stands (`raw`)."""

    model: str | None
    prompt: str | list[dict[str, Any]]
    params: SamplingParams
    stream: bool
    tools: ToolUse | None
    template_arguments: dict[str, Any] | None

    @classmethod
    def of_chat(
        cls, body: Any, base: SamplingParams, context: int, syntax: CallSyntax
    ) -> OllamaRequest:
        """Read a request of `/api/chat`."""
        fields = Fields(body)
        stated = body.get("messages")
        for message in stated if isinstance(stated, list) else ():
            if isinstance(message, dict):
                _as_openai(message)
        messages = take_messages(fields)
        tools = take_tools(fields, syntax, messages)
        return cls._of(fields, messages, base, context, tools)

    @classmethod
    def of_generate(cls, body: Any, base: SamplingParams, context: int) -> OllamaRequest:
        """Read a request of `/api/generate`."""
        fields = Fields(body)
        text, system = fields.text("prompt") or "", fields.text("system")
        if fields.flag("raw"):
            return cls._of(fields, text, base, context, None)
        messages = [{"role": "user", "content": text}]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        return cls._of(fields, messages, base, context, None)

    @classmethod
    def _of(
        cls,
        fields: Fields,
        prompt: str | list[dict[str, Any]],
        base: SamplingParams,
        context: int,
        tools: ToolUse | None,
    ) -> OllamaRequest:
        fields.refuse(REFUSED)
        _take_keep_alive(fields)
        values: dict[str, Any] = {}
        options = fields.object("options")
        if options is not None:
            values = _take_options(options, base, context)
        think, arguments = fields.take("think"), None
        if think is not None:
            arguments = {"enable_thinking": think}
        asked = cls(
            model=fields.text("model"),
            prompt=prompt,
            params=sampling_of(base, values, _format(fields.take("format"))),
            stream=fields.flag("stream", default=True),
            tools=tools,
            template_arguments=arguments,
        )
        fields.finish("model messages prompt options format stream tools think".split())
        return asked


def _take_options(fields: Fields, base: SamplingParams, context: int) -> dict[str, Any]:
    fields.ignore(*IGNORED_OPTIONS)
    fields.refuse(REFUSED_OPTIONS)
    num_context = fields.whole("num_ctx", 1, 1 << 31)
    if num_context is not None and num_context > context:
        raise ApiError(
            400,
            f"options.num_ctx is {num_context:,}, but the context of this server has {context:,} tokens: lower it, or "
            "start lowtide serve with a larger --context",
            param="options.num_ctx",
        )
    length = fields.take("num_predict")
    values = take_sampling(fields, base)
    if length is not None and length not in (-1, -2):
        values["max_tokens"] = length
    elif length is not None:
        values["max_tokens"] = None
    fields.finish()
    return values


def _take_keep_alive(fields: Fields) -> None:
    """Check how long the model must stay loaded; it stays at least as long, except where that is no time."""
    value = fields.take("keep_alive")
    if value is None:
        return
    path = fields.path("keep_alive")
    if not is_duration(value):
        raise ApiError(
            400,
            f'{path} is {shown(value)}; it must be seconds, or a duration such as "5m"',
            param=path,
            code="invalid_value",
        )
    if is_no_time(value):
        raise ApiError(
            400,
            f"{path} is {shown(value)}, but the model stays loaded as long as the server runs: leave it out",
            param=path,
            code="unsupported_parameter",
        )


def _format(value: Any) -> Any:
    if value in (None, ""):
        return None
    if value == "json":
        return {"type": "json_object"}
    if not isinstance(value, dict):
        raise ApiError(400, "format must be json, or a JSON schema", param="format")
    return {"type": "json_schema", "schema": value}


def _as_openai(message: dict[str, Any]) -> None:
    """Change ollama's form of a message to OpenAI's: results name their tool, and there are no images."""
    if message.get("images") == []:
        del message["images"]
    if "tool_name" in message:
        message["name"] = message.pop("tool_name")


class OllamaAnswer:
    """Writes one answer; `is_chat` says for which of the two paths."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._model = model
        self._is_chat = is_chat
        self._began = time.perf_counter()

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the answer as one object."""
        return self._object(answer.text, answer.calls, answer.finish)

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield lines of JSON; a call comes when it is whole."""
        answer = Answer()
        num_sent = 0
        async for pair in answers.deltas():
            if pair is None:
                continue
            delta = pair[1]
            answer.add(delta)
            if delta.text:
                yield self._line(delta.text)
            whole = len(answer.calls) - (0 if delta.finish else 1)
            if num_sent < whole:
                yield self._line("", answer.calls[num_sent:whole])
                num_sent = whole
            if delta.finish is not None:
                yield self._line("", (), delta.finish)

    def _line(
        self, text: str, calls: list[Call] | tuple[()] = (), finish: Finish | None = None
    ) -> bytes:
        return json_bytes(self._object(text, calls, finish)) + b"\n"

    def _object(
        self, text: str, calls: list[Call] | tuple[()], finish: Finish | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": self._model,
            "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"),
        }
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            whole = [_call(call) for call in calls if _is_whole(call)]
            if whole:
                message["tool_calls"] = whole
            values["message"] = message
        else:
            values["response"] = text
        values["done"] = finish is not None
        if finish is None:
            return values
        stats = finish.stats
        return {
            **values,
            "done_reason": "length" if finish.reason == "length" else "stop",
            "total_duration": _nanoseconds(time.perf_counter() - self._began),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(stats.prefill_s),
            "eval_count": stats.generated_tokens,
            "eval_duration": _nanoseconds(stats.decode_s),
        }


def _is_whole(call: Call) -> bool:
    """Whether the answer was not cut inside the call: a client would run it with other arguments."""
    try:
        json.loads(call.arguments)
    except ValueError:
        return False
    return True


def _call(call: Call) -> dict[str, Any]:
    arguments = json.loads(call.arguments)
    return {"id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
