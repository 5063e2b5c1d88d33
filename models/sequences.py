"""Sequences: several sequences of tokens in one KV cache, which go through a model together.

Knows no text and no sampling. `GgufSequences` and `FakeSequences` implement it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.models.model import RowLogits


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that go in at the end of a sequence; the logits of the last `num_wanted` are wanted."""

    sequence: int
    token_ids: Sequence[int]
    num_wanted: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCells:
    """Where the keys of a pass's parts lie, once it is computed, in the order of their tokens.

    Every part sees the first `num_shared` cells; part i has `num_rows[i]` rows, one after the other, and
    sees the cells `own[i]`, too.
    """

    num_shared: int
    num_rows: tuple[int, ...]
    own: tuple[array[int], ...]


class Sequences(ABC):
    """`num_sequences` sequences in a cache of `num_cells` tokens, of which `max_rows` go in at once.

    The logits of `max_wanted` rows of a pass come out. What the first sequence holds when `share` is called
    is the beginning of all of them, and lies there once. Close it before the model that it is of.
    """

    num_sequences: int
    num_cells: int
    max_rows: int
    max_wanted: int

    @abstractmethod
    def share(self) -> None:
        """Have all sequences begin with what the first holds; called once, before any other has tokens."""

    @abstractmethod
    def forward(self, parts: Sequence[Part]) -> RowLogits:
        """Append each part to its sequence, in one pass; a sequence has one part at most.

        Returns the logits of the rows that are wanted, in order, shape (those rows, vocabulary): a view
        that the next call overwrites. Raises `ForwardError` where native code fails; the sequences are
        of no use then.
        """

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forget a sequence's tokens from `num_tokens` on, but for shared ones; their cells are used again.

        Truncating and appending again equals never having appended.
        """

    def rows_agree(self) -> bool:
        """Whether a row beside those of the other sequences is bit for bit what it is alone, by trying.

        Called before there are tokens; there are none after it.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Closing twice is allowed."""
