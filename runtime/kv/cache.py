"""KVCache: the seam between the decode loop and the place where its sequences keep their keys and values.

Two classes implement it: `KVSession` (the one sequence of a model) and `BatchKV` (sequences that share one cache). The
loop adds a sequence while others go on, and removes it when it has ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import ForwardError
from lowtide.models.model import SequenceSlice

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D

    PassResult: TypeAlias = Logits2D | ForwardError


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrompt:
    """A prompt as the cache takes it."""

    token_ids: Sequence[int]
    """The tokens to hold: the prompt, or what a filter retained of it."""
    num_cached: int
    """Leading tokens that are in the cache already; at least one token is left to compute."""
    num_reused: int = 0
    """Of `num_cached`, the tokens that an earlier prompt or another sequence computed."""
    num_restored: int = 0
    """Of `num_reused`, the tokens that the prefix cache restored."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The tokens of one sequence in a decode pass: row 0 is the last sampled token, the others are drafts."""

    sequence: int
    tree: TokenTree


class KVCache(ABC):
    """Holds the tokens of up to `num_sequences` sequences, which are numbered from 0.

    Each prompt has an `owner`: it finds what prompts of the same one left, and nothing of others.

    A pass leaves row 0 of each decode step in its sequence. A draft joins the sequence by `accept`; `truncate` removes
    those that were rejected.
    """

    num_sequences: int = 1

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Tokens that one forward pass takes."""

    def is_awaited(self, token_ids: Sequence[int], owner: str = "") -> bool:
        """Return whether another sequence is reading a part of this prompt, which then need not be read again."""
        return False

    def can_add(self, token_ids: Sequence[int], max_tokens: int, owner: str = "") -> bool:
        """Return whether there is room for a prompt that may grow to `max_tokens` tokens with its answer."""
        return True

    @abstractmethod
    def add(
        self, sequence: int, token_ids: Sequence[int], max_tokens: int, owner: str = ""
    ) -> CachedPrompt:
        """Prepare a sequence for a prompt: find what is cached of it, and reserve memory for the rest.

        Raises `OverBudget`, before anything is computed, where the prompt does not fit.
        """

    def remove(self, sequence: int, *, is_damaged: bool = False) -> None:
        """End a sequence; its tokens may stay for prompts that begin with them, unless a pass over them failed."""
        return None

    def recover(self) -> None:
        """Make the cache usable again after a pass that failed; it is empty then, or as before the pass."""
        return None

    @abstractmethod
    def compute(
        self, chunks: Sequence[SequenceSlice], steps: Sequence[DecodeStep]
    ) -> list[PassResult]:
        """Append prompt tokens, and last tokens with their drafts, in one pass of at most `batch_size` tokens.

        Returns the logits of each chunk's last `num_logits` (0 or 1) tokens, and then of each step's first rows, shape
        (rows, vocabulary): all rows, or the trunk's where branches could not be computed. The next pass overwrites
        them. A sequence whose logits are not numbers has an error in their place.
        """

    @abstractmethod
    def accept(self, sequence: int, token_id: int, row: int) -> None:
        """Append a draft, `row` of the last decode step, to its sequence."""

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Remove a sequence's tokens from position `num_tokens` on, rejected drafts included."""

    @abstractmethod
    def num_free(self, sequence: int) -> int:
        """Return how many more tokens the sequence may have."""

    @abstractmethod
    def has_room(self, sequence: int, num_tokens: int = 1) -> bool:
        """Return whether the memory budget allows so many more tokens, and reserve them."""
