"""Accepting: which rows of a verification count, and how often proposals turn out right. Pure.

A token is chosen from a verified row as the plain loop would choose it, with the same draw, and a draft
counts if it is that very token. So greedy and sampled answers are those of the plain loop, token for token,
with whatever penalties. It is speculative rejection sampling for drafts of certain tokens: x is accepted
with the target's own probability q(x), and otherwise the token comes from q without x, so the distribution
is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.models.model import Logits, RowLogits

MEMORY = 0.96
"""What a count is worth after each later one: acceptance follows the text in some 25 proposals."""
PRIOR_WEIGHT = 3.0
"""How many proposals a draft's own word for its acceptance is worth."""
PRIOR_OF_NEXT = 0.9
"""What is taken for the next position's acceptance, as a share of the one before."""


class Verification:
    """The drafts of one pass and their rows, walked from one accepted token to the next."""

    def __init__(self, drafted: Sequence[int], rows: RowLogits) -> None:
        self._drafted = tuple(drafted)
        self._rows = rows
        self.num_accepted = 0

    @property
    def num_drafted(self) -> int:
        """How many tokens were drafted."""
        return len(self._drafted)

    @property
    def first(self) -> Logits:
        """The logits after the token that was no draft."""
        row: Logits = self._rows[0]
        return row

    def accept(self, token_id: int) -> Logits | None:
        """Return the logits after `token_id`, which was chosen; None where it is not what was drafted."""
        at = self.num_accepted
        if at == len(self._drafted) or self._drafted[at] != token_id:
            return None
        self.num_accepted += 1
        row: Logits = self._rows[self.num_accepted]
        return row


class Acceptance:
    """How often each position of a proposal is right where all before it were; recent ones count more.

    `prior` is believed of the first position before anything is counted.
    """

    def __init__(self, num_positions: int, prior: float) -> None:
        self._prior = prior
        self._tried = [0.0] * num_positions
        self._right = [0.0] * num_positions

    def count(self, num_right: int, num_wrong: int) -> None:
        """Count a proposal whose first `num_right` tokens came; then, with `num_wrong` 1, another did."""
        for position in range(min(num_right + num_wrong, len(self._tried))):
            self._tried[position] = MEMORY * self._tried[position] + 1
            self._right[position] = MEMORY * self._right[position] + (position < num_right)

    def by_position(self) -> tuple[float, ...]:
        """Return the share that was right; what is not known is nearly as the position before."""
        shares = []
        believed = self._prior
        for tried, right in zip(self._tried, self._right, strict=True):
            believed = (right + PRIOR_WEIGHT * believed) / (tried + PRIOR_WEIGHT)
            shares.append(believed)
            believed *= PRIOR_OF_NEXT
        return tuple(shares)
