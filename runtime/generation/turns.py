"""The last turns of chats, as text and as tokens: a prompt that goes on from one begins with its very tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lowtide.models.text.prompt_span import PromptSpan, span_lengths, split_spans


@dataclass(slots=True)
class LastTurn:
    """The last prompt of a chat with its answer, as text and as the tokens that the model read.

    `span_lengths` are those of the prompt without the answer (`lowtide.models.text.prompt_span.span_lengths`). Only a
    prompt of the same `owner` goes on from it.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_messages: int = 0
    span_lengths: list[int] = field(default_factory=list)
    owner: str = ""

    def set(
        self,
        text: str,
        token_ids: list[int],
        num_messages: int,
        span_lengths: Sequence[int] = (),
        owner: str = "",
    ) -> None:
        """Replace the turn; with an empty text the next prompt is tokenised as a whole."""
        self.text, self.token_ids, self.num_messages = text, token_ids, num_messages
        self.span_lengths, self.owner = list(span_lengths), owner

    def begins(self, spans: Sequence[PromptSpan], text: str, owner: str = "") -> bool:
        """Whether a prompt of `owner` begins with this one, written by the same, and with its answer.

        A message that spells the whole turn has the same text, and must not get its control tokens.
        """
        if not self.text or owner != self.owner or not text.startswith(self.text):
            return False
        prompt, _ = split_spans(spans, sum(self.span_lengths))
        return span_lengths(prompt) == self.span_lengths

    def find(self, spans: Sequence[PromptSpan], text: str, owner: str = "") -> LastTurn | None:
        """Return the turn where a prompt begins with it."""
        return self if self.begins(spans, text, owner) else None

    def remember(self, turn: LastTurn) -> None:
        """Replace the turn by another one, which may be empty."""
        self.set(turn.text, turn.token_ids, turn.num_messages, turn.span_lengths, turn.owner)


class Turns(Protocol):
    """The turns that a prompt may go on from: one chat's (`LastTurn`), or those of several (`RecentTurns`)."""

    def find(self, spans: Sequence[PromptSpan], text: str, owner: str = "") -> LastTurn | None:
        """Return the longest turn that a prompt begins with."""
        ...

    def remember(self, turn: LastTurn) -> None:
        """Remember a turn; one without text is none."""
        ...


class RecentTurns:
    """The last turns of several chats, the oldest forgotten first, of at most `max_tokens` tokens in all."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._turns: list[LastTurn] = []

    def find(self, spans: Sequence[PromptSpan], text: str, owner: str = "") -> LastTurn | None:
        """Return the longest turn that a prompt begins with."""
        found = [turn for turn in self._turns if turn.begins(spans, text, owner)]
        return max(found, key=lambda turn: len(turn.text), default=None)

    def remember(self, turn: LastTurn) -> None:
        """Remember a turn in place of those that it goes on from."""
        if not turn.text:
            return
        kept = [
            one
            for one in self._turns
            if one.owner != turn.owner or not turn.text.startswith(one.text)
        ]
        self._turns = [*kept, turn]
        while sum(len(one.token_ids) for one in self._turns) > self._max_tokens:
            self._turns = self._turns[1:]
