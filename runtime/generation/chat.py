"""Conversation: messages to prompt tokens, so that a new turn costs only its new tokens.

Knows no model but its tokenizer and template. An answer that was generated goes back into the next
prompt as the very tokens that were sampled: written out and tokenised again they could be others.

What to do with a prompt beyond the context: refuse it, or drop the oldest of it and say so.

Pure but for the function that turns messages into tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowtide.models.chat_template import ChatTemplate, Message
from lowtide.models.errors import TemplateError
from lowtide.models.tokenizer import Tokenizer
from lowtide.runtime.errors import PromptTooLong
from lowtide.runtime.options import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A prompt as text and as tokens, and how many messages are in it."""

    text: str
    token_ids: Sequence[int]
    num_messages: int


@dataclass(slots=True)
class LastTurn:
    """The last prompt of a chat with its answer, as text and as the tokens that it was read as."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_messages: int = 0

    def set(self, text: str, token_ids: list[int], num_messages: int) -> None:
        """Be another one; with an empty text the next prompt is tokenised whole."""
        self.text, self.token_ids, self.num_messages = text, token_ids, num_messages


class ChatEncoder:
    """Writes prompts and keeps `last` up to date."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, last: LastTurn) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._last = last

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt as text."""
        return self._template.render(messages)

    def prompt_ids(self, text: str, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the rendered prompt `text`.

        Only the template may write control tokens: where a message spells one out, it is read as
        plain text.
        """
        last = self._last
        if last.text and text.startswith(last.text):
            rest = text[len(last.text) :]
            new_messages = messages[last.num_messages :]
            return [*last.token_ids, *self._encode(rest, new_messages, add_special=False)]
        begins_text = self._tokenizer.special_texts.get("bos_token") or None
        add_special = begins_text is None or not text.startswith(begins_text)
        return self._encode(text, messages, add_special=add_special)

    def answered(self, prompt: ChatPrompt, answer_ids: Sequence[int]) -> None:
        """Remember what followed the prompt, also where the answer was cut short."""
        answer = self._tokenizer.decode(answer_ids)
        if "\ufffd" in answer:  # half a character: its tokens do not spell the text that was shown
            self._last.set("", [], 0)
            return
        token_ids = [*prompt.token_ids, *answer_ids]
        self._last.set(prompt.text + answer, token_ids, prompt.num_messages + 1)

    def _encode(self, text: str, messages: Sequence[Message], *, add_special: bool) -> list[int]:
        forged = [m["content"] for m in messages if self._spells_control_tokens(m["content"])]
        token_ids: list[int] = []
        position = 0
        for content in forged:
            start, written = _find(text, content, position)
            if start > position:
                token_ids += self._tokenizer.encode(
                    text[position:start], add_special=add_special, parse_special=True
                )
                add_special = False
            token_ids += self._tokenizer.encode(written, add_special=False, parse_special=False)
            position = start + len(written)
        rest = self._tokenizer.encode(text[position:], add_special=add_special, parse_special=True)
        return token_ids + rest

    def _spells_control_tokens(self, content: str) -> bool:
        plain = self._tokenizer.encode(content, add_special=False, parse_special=False)
        return plain != self._tokenizer.encode(content, add_special=False, parse_special=True)


def _find(text: str, content: str, position: int) -> tuple[int, str]:
    """Return where `content` stands in the rendered text, as written or without its outer blanks."""
    for written in (content, content.strip()):
        start = text.find(written, position)
        if start >= 0:
            return start, written
    raise TemplateError(
        "a message spells out one of the model's control tokens and the chat template rewrites it: "
        "take the token out of the message"
    )


MAX_ANSWER_ROOM = 256
"""Tokens kept free for the answer when something is dropped anyway; at most a quarter of the context."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What did not fit."""

    num_tokens: int = 0
    num_messages: int = 0


def fit_messages(
    messages: Sequence[Message],
    prepare: Callable[[Sequence[Message]], ChatPrompt],
    context: int,
    options: SamplingParams,
) -> tuple[ChatPrompt, Dropped]:
    """Return the prompt of `messages`, without the oldest turns where the options allow that.

    Dropping leaves room for an answer. A system message and the last message always stay, and the rest
    begins with a user's turn. `prepare` may raise `PromptTooLong` with an estimate, for a text too long to
    tokenise: what was dropped is then an estimate too. Raises `PromptTooLong` where nothing fits.
    """
    if options.overflow != "drop-oldest":
        prompt = prepare(messages)
        if len(prompt.token_ids) > context:
            raise PromptTooLong(len(prompt.token_ids), context)
        return prompt, Dropped()
    has_system = bool(messages) and messages[0].get("role") == "system"
    system, turns = list(messages[:has_system]), list(messages[has_system:])
    starts = [0, *(i for i in range(1, len(turns)) if turns[i].get("role") == "user")]
    sizes: dict[int, int] = {}

    def prompt_from(start: int) -> ChatPrompt | None:
        try:
            prompt = prepare([*system, *turns[start:]])
        except PromptTooLong as error:
            sizes[start] = error.num_tokens
            return None
        sizes[start] = len(prompt.token_ids)
        return prompt

    def is_roomy(start: int) -> bool:
        return prompt_from(start) is not None and sizes[start] <= room

    room = context - answer_room(context, options)
    # The later it starts, the shorter the prompt: the earliest start that leaves room is found by halves.
    first = 0 if is_roomy(0) else bisect_left(starts, True, lo=1, key=is_roomy)
    start = starts[min(first, len(starts) - 1)]
    chosen = prompt_from(start)
    if chosen is None or sizes[start] > context:
        raise PromptTooLong(sizes[start], context, estimated=chosen is None, droppable=False)
    return chosen, Dropped(sizes[0] - sizes[start], start)


def fit_tokens(
    token_ids: Sequence[int], context: int, options: SamplingParams
) -> tuple[list[int], int]:
    """Return the tokens, or the last of them that leave room for an answer, and how many were dropped."""
    room = context
    if options.overflow == "drop-oldest":
        room -= answer_room(context, options)
    elif len(token_ids) > context:
        raise PromptTooLong(len(token_ids), context)
    kept = list(token_ids[-room:])
    return kept, len(token_ids) - len(kept)


def answer_room(context: int, options: SamplingParams) -> int:
    """Return how many tokens to leave free for the answer."""
    return min(options.max_tokens or MAX_ANSWER_ROOM, MAX_ANSWER_ROOM, context // 4)
