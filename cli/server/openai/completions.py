"""`/v1/completions`: continues texts as they stand, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.openai.chat import IGNORED, MAX_ANSWERS, own_values, take_stream, usage
from lowtide.cli.server.reading.fields import Fields
from lowtide.cli.server.reading.parameters import SAMPLING, sampling_of, take_format, take_sampling
from lowtide.cli.server.streaming import DONE, KEEP_ALIVE, Answers, event
from lowtide.models.arguments.values import shown
from lowtide.runtime.generation.logprobs import TokenLogprob
from lowtide.runtime.options import MAX_TOP_LOGPROBS, SamplingParams
from lowtide.runtime.serving.deltas import Answer, Delta, Finish

MAX_PROMPTS = 64
REFUSED = {
    "suffix": "lowtide continues texts at their end alone",
    "tools": "they are for chats: use /v1/chat/completions",
}
KNOWN = (
    *SAMPLING,
    *"prompt model stream stream_options n max_tokens logprobs echo response_format".split(),
)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request for completions."""

    model: str | None
    prompts: list[str]
    params: SamplingParams
    num_answers: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @classmethod
    def of(cls, body: Any, base: SamplingParams) -> CompletionRequest:
        """Read a request; raises `ApiError` for what is wrong, unknown or not supported."""
        fields = Fields(body)
        fields.ignore(*IGNORED)
        fields.refuse(REFUSED)
        model, prompts = fields.text("model"), _take_prompts(fields)
        stream, include_usage = take_stream(fields)
        values = take_sampling(fields, base, length_fields=("max_tokens",))
        values["logprobs"] = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)
        num_answers = fields.whole("n", 1, MAX_ANSWERS) or 1
        if (fields.whole("best_of", 1, MAX_ANSWERS) or num_answers) != num_answers:
            raise ApiError(
                400, "best_of must equal n: lowtide returns every answer", param="best_of"
            )
        asked = cls(
            model=model,
            prompts=prompts,
            params=sampling_of(base, values, take_format(fields)),
            num_answers=num_answers,
            stream=stream,
            include_usage=include_usage,
            echo=fields.flag("echo"),
        )
        if asked.echo and asked.params.logprobs is not None:
            raise ApiError(
                400, "echo and logprobs exclude each other: prompts are not scored", param="echo"
            )
        fields.finish(KNOWN)
        return asked

    def each(self) -> tuple[list[str], list[SamplingParams]]:
        """Return the prompt and the parameters of each answer; those of one prompt have seeds of their own."""
        seed, numbers = self.params.seed, range(self.num_answers)
        params = [
            self.params if seed is None else replace(self.params, seed=seed + i) for i in numbers
        ]
        prompts = [prompt for prompt in self.prompts for _ in numbers]
        return prompts, params * len(self.prompts)


def _take_prompts(fields: Fields) -> list[str]:
    value = fields.take("prompt")
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or len(prompts) > MAX_PROMPTS:
        raise ApiError(
            400,
            f"prompt is {shown(value)}; it must be a text, or 1 to {MAX_PROMPTS} texts",
            param="prompt",
        )
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ApiError(400, "prompt has tokens; send texts", param="prompt")
    return prompts


class CompletionAnswer:
    """Writes the answers of one request, in OpenAI's form."""

    def __init__(self, model: str, asked: CompletionRequest, prompts: list[str]) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex[:24]}"
        self._created = int(time.time())
        self._model = model
        self._asked = asked
        self._prompts = prompts

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the answers as one object."""
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        choices = [
            self._choice(
                i,
                (self._prompts[i] if self._asked.echo else "") + answer.text,
                answer.logprobs,
                answer.finish,
            )
            for i, answer in enumerate(answers)
        ]
        usage_of_all = _usage(finishes, self._asked.num_answers)
        return {
            **self._head(),
            "choices": choices,
            "usage": usage_of_all,
            "lowtide": own_values(finishes),
        }

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        finishes: list[Finish] = []
        for index, prompt in enumerate(self._prompts if self._asked.echo else ()):
            yield self._event(index, Delta(prompt))
        async for pair in answers.deltas():
            if pair is None:
                yield KEEP_ALIVE
                continue
            index, delta = pair
            if delta.finish is not None:
                finishes.append(delta.finish)
            if delta.text or delta.logprobs is not None or delta.finish is not None:
                yield self._event(index, delta)
        if self._asked.include_usage:
            used = _usage(finishes, self._asked.num_answers)
            yield event({**self._head(), "choices": [], "usage": used})
        yield DONE

    def _event(self, index: int, delta: Delta) -> bytes:
        scored = [] if delta.logprobs is None else [delta.logprobs]
        chunk = {
            **self._head(),
            "choices": [self._choice(index, delta.text, scored, delta.finish)],
        }
        if self._asked.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _choice(
        self, index: int, text: str, scored: list[TokenLogprob], finish: Finish | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._asked.params.logprobs is None else _logprobs(scored),
            "finish_reason": finish.reason if finish else None,
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }


def _usage(finishes: list[Finish], num_answers: int) -> dict[str, Any]:
    """Return the tokens of a request; the answers of one prompt share it."""
    found = usage(finishes)
    if finishes:
        found["prompt_tokens"] = sum(one.stats.prompt_tokens for one in finishes) // num_answers
        found["total_tokens"] = found["prompt_tokens"] + found["completion_tokens"]
    return found


def _logprobs(scored: list[TokenLogprob]) -> dict[str, Any]:
    offsets, length = [], 0
    for one in scored:
        offsets.append(length)
        length += len(one.text)
    return {
        "tokens": [one.text for one in scored],
        "token_logprobs": [one.logprob for one in scored],
        "top_logprobs": [{top.text: top.logprob for top in one.top} for one in scored],
        "text_offset": offsets,
    }
