"""SingleSequence: the first of several sequences, as a model has its only one: passes are measured so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.models.sequences import Part, Sequences

if TYPE_CHECKING:
    from lowtide.models.model import Logits, RowLogits


class SingleSequence:
    """Appends to the first sequence, and takes off again; `sequences` hold no tokens before and after."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last row, shape (vocabulary,)."""
        row: Logits = self._sequences.forward([Part(0, token_ids)])[0]
        return row

    def forward_rows(self, token_ids: Sequence[int]) -> RowLogits:
        """Append the tokens and return the logits of every row, shape (rows, vocabulary)."""
        return self._sequences.forward([Part(0, token_ids, num_wanted=len(token_ids))])

    def truncate(self, num_tokens: int) -> None:
        """Forget every token from position `num_tokens` on."""
        self._sequences.truncate(0, num_tokens)
