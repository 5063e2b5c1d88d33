"""KVCache: the seam between the decode loop and the place where its sequences keep their keys and values.

Two classes implement it: `KVSession` (the one sequence of a model) and `BatchKV` (sequences that share one
cache). The loop asks for one sequence at a time with `add`, so a caller may add a sequence while others go on;
`truncate(sequence, 0)` empties one that has finished.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.models.draft_tree import TokenTree
from lowtide.models.model import SequenceSlice

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


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
    """Holds the tokens of several sequences, which are numbered from 0.

    A decode pass leaves row 0 of each step in its sequence. A draft joins the sequence by `accept`;
    `truncate` removes those that were rejected.
    """

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Tokens that one forward pass takes."""

    @abstractmethod
    def add(self, sequence: int, token_ids: Sequence[int]) -> CachedPrompt:
        """Prepare a sequence for a prompt: find what is cached of it, and reserve memory for the rest.

        Raises `OverBudget`, before anything is computed, where the prompt does not fit.
        """

    @abstractmethod
    def prefill(self, chunks: Sequence[SequenceSlice]) -> list[Logits2D]:
        """Append prompt tokens to each sequence in one pass of at most `batch_size` tokens.

        Returns the logits of each chunk's last `num_logits` (0 or 1) tokens, shape (num_logits, vocabulary).
        The next pass overwrites them.
        """

    @abstractmethod
    def decode(self, steps: Sequence[DecodeStep]) -> list[Logits2D]:
        """Compute each sequence's last token and its drafts in one pass.

        Returns the logits of each step's first rows, shape (rows, vocabulary): all rows, or the trunk's where
        branches could not be computed. The next pass overwrites them.
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
    def has_room(self, sequence: int) -> bool:
        """Return whether the memory budget allows one more token, and reserve it."""
