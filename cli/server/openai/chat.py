"""`/v1/chat/completions`: OpenAI's chat, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.reading.fields import Fields
from lowtide.cli.server.reading.messages import take_messages
from lowtide.cli.server.reading.parameters import SAMPLING, sampling_of, take_format, take_sampling
from lowtide.cli.server.reading.tools import take_tools
from lowtide.cli.server.streaming import DONE, KEEP_ALIVE, Answers, event
from lowtide.runtime.generation.logprobs import TokenLogprob
from lowtide.runtime.options import MAX_TOP_LOGPROBS, SamplingParams
from lowtide.runtime.serving.deltas import Answer, Delta, Finish
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.reader import CallDelta
from lowtide.runtime.tools.use import ToolUse

MAX_ANSWERS = 16
"""The most answers (`n`) of one request."""
IGNORED = (
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention"
).split()
"""Fields that change no answer here."""
VERBOSITY = "the models here have no such setting: ask for short or long answers in the messages"
REFUSED = {
    "audio": "lowtide writes text alone",
    "functions": "it is the old form of tools: send those",
    "function_call": "it is the old form of tool_choice: send that",
    "prediction": "lowtide drafts by itself; see --speculate",
    "web_search_options": "lowtide does not search the web",
}
KNOWN = (
    *SAMPLING,
    *"model messages stream stream_options n max_tokens max_completion_tokens response_format logprobs".split(),
    *"top_logprobs tools tool_choice parallel_tool_calls chat_template_kwargs".split(),
)


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request for chat completions."""

    model: str | None
    messages: list[dict[str, Any]]
    params: SamplingParams
    num_answers: int = 1
    stream: bool = False
    include_usage: bool = False
    template_arguments: dict[str, Any] | None = None
    tools: ToolUse | None = None

    @classmethod
    def of(cls, body: Any, base: SamplingParams, syntax: CallSyntax) -> ChatRequest:
        """Read a request; raises `ApiError` for what is wrong, unknown or not supported."""
        fields = Fields(body)
        fields.ignore(*IGNORED)
        fields.refuse(REFUSED)
        fields.only("verbosity", "medium", VERBOSITY)
        modalities = fields.list("modalities")
        if modalities not in (None, ["text"]):
            raise ApiError(400, "modalities must be text alone", param="modalities")
        model, messages = fields.text("model"), take_messages(fields)
        stream, include_usage = take_stream(fields)
        values = take_sampling(fields, base, length_fields=("max_completion_tokens", "max_tokens"))
        values["logprobs"] = _take_logprobs(fields)
        params = sampling_of(base, values, take_format(fields))
        asked = cls(
            model=model,
            messages=messages,
            params=params,
            num_answers=fields.whole("n", 1, MAX_ANSWERS) or 1,
            stream=stream,
            include_usage=include_usage,
            template_arguments=take_template_arguments(fields),
            tools=take_tools(fields, syntax, messages),
        )
        fields.finish(KNOWN)
        return asked

    def params_of_each(self) -> list[SamplingParams]:
        """Return the parameters of each answer: their seeds differ."""
        seed = self.params.seed
        return [
            self.params if seed is None else replace(self.params, seed=seed + i)
            for i in range(self.num_answers)
        ]


def take_stream(fields: Fields) -> tuple[bool, bool]:
    """Return whether the answer is streamed, and whether its last chunk has the usage."""
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options is None:
        return stream, False
    include_usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.finish(["include_usage"])
    return stream, include_usage


def take_template_arguments(fields: Fields) -> dict[str, Any] | None:
    """Return the arguments of the chat template."""
    arguments = fields.take("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, dict):
        raise ApiError(400, "chat_template_kwargs must be an object", param="chat_template_kwargs")
    return arguments


def _take_logprobs(fields: Fields) -> int | None:
    wanted, num_top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if num_top is not None and not wanted:
        raise ApiError(
            400, "top_logprobs needs logprobs: set logprobs to true", param="top_logprobs"
        )
    return (num_top or 0) if wanted else None


class ChatAnswer:
    """Writes the answers of one request, in OpenAI's form."""

    def __init__(self, model: str, *, with_logprobs: bool, include_usage: bool) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex[:24]}"
        self._created = int(time.time())
        self._model = model
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the answers as one object."""
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage(finishes),
            "lowtide": own_values(finishes),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "refusal": None,
        }
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(answer.logprobs) if self._with_logprobs else None,
            "finish_reason": answer.finish.reason if answer.finish else "stop",
        }

    async def stream(self, answers: Answers, num_answers: int) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        for index in range(num_answers):
            yield event(self._chunk(index, {"role": "assistant", "content": ""}))
        finishes: list[Finish] = []
        async for pair in answers.deltas():
            if pair is None:
                yield KEEP_ALIVE
                continue
            index, delta = pair
            if delta.text or delta.logprobs is not None:
                yield event(self._chunk(index, {"content": delta.text}, delta=delta))
            for call in delta.calls:
                yield event(self._chunk(index, {"tool_calls": [call_delta(call)]}))
            if delta.finish is not None:
                finishes.append(delta.finish)
                yield event(self._chunk(index, {}, finish=delta.finish))
        if self._include_usage:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": usage(finishes)})
        yield DONE

    def _chunk(
        self,
        index: int,
        changed: dict[str, Any],
        *,
        delta: Delta | None = None,
        finish: Finish | None = None,
    ) -> dict[str, Any]:
        scored = [delta.logprobs] if delta is not None and delta.logprobs is not None else []
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [
                {
                    "index": index,
                    "delta": changed,
                    "logprobs": _logprobs(scored) if self._with_logprobs and scored else None,
                    "finish_reason": finish.reason if finish else None,
                }
            ],
        }
        if self._include_usage:
            chunk["usage"] = None
        if finish is not None:
            chunk["lowtide"] = own_values([finish])
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def call_delta(call: CallDelta) -> dict[str, Any]:
    """Return a part of a call: id, type and name are in its first part alone."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def usage(finishes: list[Finish]) -> dict[str, Any]:
    """Return the tokens of a request; the answers of one request share their prompt."""
    prompt = max((one.stats.prompt_tokens for one in finishes), default=0)
    cached = max((one.stats.reused_tokens for one in finishes), default=0)
    completion = sum(one.stats.generated_tokens for one in finishes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def own_values(finishes: list[Finish]) -> dict[str, Any]:
    """Return what lowtide says beside OpenAI's fields, of the last answer that ended."""
    if not finishes:
        return {}
    last = finishes[-1]
    return {
        "finish_reason": last.own_reason,
        "structured": last.stats.structured,
        "dropped_messages": last.stats.dropped_messages,
        "seed": last.stats.seed,
        "identical": last.stats.batch is None or last.stats.batch["identical"],
        "time_to_first_token_s": last.stats.time_to_first_token_s,
        "prefill_tokens_per_s": last.stats.prefill_tokens_per_s,
        "decode_tokens_per_s": last.stats.decode_tokens_per_s,
    }


def _logprobs(scored: list[TokenLogprob]) -> dict[str, Any]:
    return {"content": [_scored(one, with_top=True) for one in scored], "refusal": None}


def _scored(one: TokenLogprob, *, with_top: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = {
        "token": one.text,
        "logprob": one.logprob,
        "bytes": list(one.token),
    }
    if with_top:
        values["top_logprobs"] = [_scored(other) for other in one.top]
    return values
