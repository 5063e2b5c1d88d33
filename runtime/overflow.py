"""What to do with a prompt beyond the context: refuse it, or drop the oldest of it and say so.

Pure but for the function that turns messages into tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowtide.models.chat_template import Message
from lowtide.runtime.conversation import ChatPrompt
from lowtide.runtime.errors import PromptTooLong
from lowtide.runtime.options import GenerationOptions

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
    options: GenerationOptions,
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
    token_ids: Sequence[int], context: int, options: GenerationOptions
) -> tuple[list[int], int]:
    """Return the tokens, or the last of them that leave room for an answer, and how many were dropped."""
    room = context
    if options.overflow == "drop-oldest":
        room -= answer_room(context, options)
    elif len(token_ids) > context:
        raise PromptTooLong(len(token_ids), context)
    kept = list(token_ids[-room:])
    return kept, len(token_ids) - len(kept)


def answer_room(context: int, options: GenerationOptions) -> int:
    """Return how many tokens to leave free for the answer."""
    return min(options.max_tokens or MAX_ANSWER_ROOM, MAX_ANSWER_ROOM, context // 4)
