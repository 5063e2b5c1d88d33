"""From a text or chat messages to a request: render, check the size, tokenise, fit into the context.

A new turn of a chat costs only its new tokens: an answer that was generated goes into the next prompt as the very
tokens that were sampled, because its text might be tokenised otherwise.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lowtide.models.chat_template import ChatTemplate, Message
from lowtide.models.errors import BadOption
from lowtide.models.text.prompt_span import PromptSpan, span_lengths, split_spans, text_of
from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.errors import PromptTooLong
from lowtide.runtime.generation.state import GenerationRequest
from lowtide.runtime.generation.turns import LastTurn, Turns
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import SILENT, Profiler

if TYPE_CHECKING:
    from lowtide.runtime.tools.grammar import CallSyntax
    from lowtide.runtime.tools.use import ToolUse

MAX_ANSWER_ROOM = 256
"""Most tokens that are left free for the answer when something is dropped; never more than a quarter of the
context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A rendered chat as text and as tokens, who wrote its text (`span_lengths`), and the number of its messages.

    `owner` is who asked.
    """

    text: str
    span_lengths: Sequence[int]
    token_ids: Sequence[int]
    num_messages: int
    owner: str = ""


class PromptEncoder:
    """Encodes prompts, and remembers the last turns of chats in `turns`.

    `template` is the model's chat template, None for a model without one. `check_text` may raise
    `PromptTooLong` for a text that is too large to be tokenised.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        turns: Turns,
        check_text: Callable[[str], None] = lambda _text: None,
        profiler: Profiler = SILENT,
    ) -> None:
        self._tokenizer = tokenizer
        self._template_text = template
        self._turns = turns
        self._check_text = check_text
        self._profiler = profiler
        self._template: ChatTemplate | None = None

    def beside(self, turns: Turns, check_text: Callable[[str], None]) -> PromptEncoder:
        """Return an encoder with the same template for another thread, which remembers turns of its own."""
        return PromptEncoder(
            self._tokenizer, self._template_text, turns, check_text, self._profiler
        )

    def encode_text(
        self, text: str, context: int, params: SamplingParams, asked_at: float
    ) -> GenerationRequest:
        """Return the request to continue `text` as it stands, in a context of `context` tokens.

        With `params.special` the control tokens that it spells are tokens; else they are text, as in a message.
        Raises `PromptTooLong` where it does not fit, and `BadOption` where it has no token.
        """
        self._check_text(text)
        with self._profiler.span("tokenise"):
            spans = [PromptSpan(text, from_message=not params.special)]
            token_ids = self._tokenizer.encode_spans(spans, add_special=True)
        if not token_ids:
            raise BadOption(
                "the prompt is empty and this model adds no token of its own; pass a text"
            )
        fitted, num_dropped = fit_tokens(token_ids, context, params)
        return GenerationRequest(
            token_ids=fitted, params=params, asked_at=asked_at, dropped_tokens=num_dropped
        )

    def spells_control_tokens(self, text: str) -> bool:
        """Whether `text` has other tokens where the control tokens that it spells are parsed."""
        self._check_text(text)
        written, said = (
            self._tokenizer.encode_spans([PromptSpan(text, from_message)], add_special=False)
            for from_message in (False, True)
        )
        return written != said

    def encode_chat(
        self,
        messages: Sequence[Message],
        context: int,
        params: SamplingParams,
        asked_at: float,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        owner: str = "",
    ) -> tuple[GenerationRequest, ChatPrompt]:
        """Return the request to answer `messages`, and the prompt to `remember` with its answer.

        `tools` and `arguments` are for the template. It goes on from turns of `owner` alone. Raises `PromptTooLong`
        where the messages do not fit, and `TemplateError` where they cannot be rendered.
        """
        render = partial(self._render, tools=tools, arguments=arguments, owner=owner)
        prompt, dropped = fit_messages(messages, render, context, params)
        request = GenerationRequest(
            token_ids=prompt.token_ids,
            params=params,
            asked_at=asked_at,
            dropped_tokens=dropped.num_tokens,
            dropped_messages=dropped.num_messages,
        )
        return request, prompt

    def count(self, text: str) -> int:
        """Return how many tokens a text has as a prompt."""
        self._check_text(text)
        return len(self._tokenizer.encode(text, add_special=True, parse_special=False))

    @functools.cached_property
    def call_syntax(self) -> CallSyntax:
        """How the model writes calls of tools."""
        from lowtide.models.template.call_format import call_format
        from lowtide.runtime.tools.grammar import (
            CallSyntax,  # 1.3 MiB that other answers do without
        )

        return CallSyntax.of(call_format(self._chat_template), self._tokenizer)

    def with_tools(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: Sequence[Any] | ToolUse | None,
        choice: str,
    ) -> tuple[Sequence[Message], SamplingParams, Sequence[Mapping[str, Any]] | None]:
        """Return messages, parameters and tools of the template for an answer that may call `tools`; see `ToolUse`."""
        if tools is None or (isinstance(tools, Sequence) and not tools):
            if choice not in ("auto", "none"):
                raise BadOption("tool_choice needs tools: pass some, or leave it out")
            return messages, params, None
        from lowtide.runtime.tools.use import ToolUse

        use = tools if isinstance(tools, ToolUse) else ToolUse(self.call_syntax, tools, choice)
        return use.messages(messages), use.params(params), use.for_template

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._template_text, self._tokenizer.special_texts)
        return self._template

    def remember(self, prompt: ChatPrompt, answer_ids: Sequence[int]) -> None:
        """Remember the answer of a chat prompt, also where it was cut short."""
        answer = self._tokenizer.decode(answer_ids)
        if "\ufffd" in answer:  # half a character: the tokens do not spell the text that was shown
            self._turns.remember(LastTurn())
            return
        token_ids = [*prompt.token_ids, *answer_ids]
        text, num_messages = prompt.text + answer, prompt.num_messages + 1
        lengths = list(prompt.span_lengths)
        self._turns.remember(LastTurn(text, token_ids, num_messages, lengths, prompt.owner))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any] | None,
        owner: str,
    ) -> ChatPrompt:
        with self._profiler.span("template"):
            spans = self._chat_template.render(messages, tools=tools, arguments=arguments)
        text = text_of(spans)
        self._check_text(text)
        with self._profiler.span("tokenise"):
            token_ids = self._chat_ids(spans, text, owner)
        return ChatPrompt(
            text=text,
            span_lengths=span_lengths(spans),
            token_ids=token_ids,
            num_messages=len(messages),
            owner=owner,
        )

    def _chat_ids(self, spans: Sequence[PromptSpan], text: str, owner: str) -> list[int]:
        """Return the tokens of a rendered chat, those of a turn that it goes on from as they were.

        A sampled answer is often not what its text is tokenised to. Where it is, the chat has the tokens of the same
        chat read anew, also where a token reaches over the end of the answer.
        """
        token_ids, last = self._encode(spans), self._turns.find(spans, text, owner)
        if last is None:
            return token_ids
        if token_ids[: len(last.token_ids)] == last.token_ids:
            return token_ids
        before, behind = split_spans(spans, len(last.text))
        if self._encode(before) == last.token_ids:
            return token_ids
        return [*last.token_ids, *self._encode(behind, continues=True)]

    def _encode(self, spans: Sequence[PromptSpan], *, continues: bool = False) -> list[int]:
        return self._tokenizer.encode_spans(
            spans,
            add_special=not continues,
            continues=continues,
            template=self._template_text or "",
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """What of a prompt was left out."""

    num_tokens: int = 0
    num_messages: int = 0


def fit_messages(
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], ChatPrompt],
    context: int,
    params: SamplingParams,
) -> tuple[ChatPrompt, Dropped]:
    """Return the prompt of `messages`, without the oldest turns where `overflow` allows that.

    Dropping leaves room for an answer. A system message and the last message always stay, and the rest begins with
    a user's turn. `render` may raise `PromptTooLong` with an estimate, for a text that is too long to tokenise:
    the dropped tokens are then an estimate, too. Raises `PromptTooLong` where nothing fits.
    """
    if params.overflow != "drop-oldest":
        prompt = render(messages)
        if len(prompt.token_ids) > context:
            raise PromptTooLong(len(prompt.token_ids), context)
        return prompt, Dropped()
    has_system = bool(messages) and messages[0].get("role") == "system"
    system, turns = list(messages[:has_system]), list(messages[has_system:])
    starts = [0, *(i for i in range(1, len(turns)) if turns[i].get("role") == "user")]
    sizes: dict[int, int] = {}

    def prompt_from(start: int) -> ChatPrompt | None:
        try:
            prompt = render([*system, *turns[start:]])
        except PromptTooLong as error:
            sizes[start] = error.num_tokens
            return None
        sizes[start] = len(prompt.token_ids)
        return prompt

    def leaves_room(start: int) -> bool:
        return prompt_from(start) is not None and sizes[start] <= room

    room = context - answer_room(context, params)
    # The later the start, the shorter the prompt: bisect for the earliest start that leaves room.
    first = 0 if leaves_room(0) else bisect_left(starts, True, lo=1, key=leaves_room)
    start = starts[min(first, len(starts) - 1)]
    chosen = prompt_from(start)
    if chosen is None or sizes[start] > context:
        raise PromptTooLong(sizes[start], context, estimated=chosen is None, droppable=False)
    return chosen, Dropped(sizes[0] - sizes[start], start)


def fit_tokens(
    token_ids: Sequence[int], context: int, params: SamplingParams
) -> tuple[list[int], int]:
    """Return the tokens, or the last ones that leave room for an answer, and how many were dropped."""
    room = context
    if params.overflow == "drop-oldest":
        room -= answer_room(context, params)
    elif len(token_ids) > context:
        raise PromptTooLong(len(token_ids), context)
    fitted = list(token_ids[-room:])
    return fitted, len(token_ids) - len(fitted)


def answer_room(context: int, params: SamplingParams) -> int:
    """Return how many tokens to leave free for the answer."""
    return min(params.max_tokens or MAX_ANSWER_ROOM, MAX_ANSWER_ROOM, context // 4)
