"""What to do with a prompt beyond the context: refuse it, or drop the oldest of it and say so.

Pure but for the function that turns messages into tokens.
"""

from __future__ import annotations

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
    begins with a user's turn. Raises `PromptTooLong` where that does not fit.
    """
    prompt = prepare(messages)
    num_tokens = len(prompt.token_ids)
    if options.overflow != "drop-oldest":
        if num_tokens > context:
            raise PromptTooLong(num_tokens, context)
        return prompt, Dropped()
    has_system = bool(messages) and messages[0].get("role") == "system"
    system, turns = list(messages[:has_system]), list(messages[has_system:])
    dropped_turns = 0
    for start in range(1, len(turns)):
        if len(prompt.token_ids) <= context - answer_room(context, options):
            break
        if turns[start].get("role") == "user":
            prompt, dropped_turns = prepare([*system, *turns[start:]]), start
    if len(prompt.token_ids) > context:
        raise PromptTooLong(len(prompt.token_ids), context, droppable=False)
    return prompt, Dropped(num_tokens - len(prompt.token_ids), dropped_turns)


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
