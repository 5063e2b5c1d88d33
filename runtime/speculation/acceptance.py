"""Accepting: which rows of a verification count, and how often proposals turn out right. Pure.

A token is chosen from a verified row as the plain loop would choose it, with the same draw, and a draft
counts if it is that very token. So greedy and sampled answers are those of the plain loop, token for token,
with whatever penalties. For drafts of certain tokens it is speculative rejection sampling: x is accepted
with the target's own probability q(x), and otherwise the token comes from q without x. So it is in a tree,
one child after the other (recursive rejection sampling without replacement: the second child is accepted
with q(y) / (1 - q(x)) where the first was not), and the distribution is exact.

SpeculationRecord: what speculation did in one answer, counted. Decides nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lowtide.models.draft_tree import TEXT, TokenTree

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


MEMORY = 0.96
"""What a count is worth after each later one: acceptance follows the text in some 25 proposals."""
PRIOR_WEIGHT = 3.0
"""How many proposals a draft's own word for its acceptance is worth."""
PRIOR_OF_NEXT = 0.9
"""What is taken for the next position's acceptance, as a share of the one before."""
PRIOR_OF_OTHERS = 0.2
"""What is taken at first for the token beside a wrong one: rather too little."""


class DraftVerification:
    """The tree of one pass and its rows, walked from one accepted token to the next.

    `rows` are the logits of the tree's first rows; what has none cannot be accepted. Row 0 is no draft.
    """

    def __init__(self, tree: TokenTree, rows: Logits2D) -> None:
        self._tree = tree
        self._rows = rows
        self.row = 0
        """Where the walk stands."""
        self.num_accepted = 0

    @property
    def first(self) -> Logits:
        """The logits after the token that was no draft."""
        row: Logits = self._rows[0]
        return row

    @property
    def is_branch(self) -> bool:
        """Whether the walk has left the trunk."""
        return self.row >= self._tree.trunk_rows

    def accept(self, token_id: int) -> Logits | None:
        """Return the logits after `token_id`, which was chosen; None where it is not what was drafted."""
        child = self._tree.child(self.row, token_id)
        if child is None or child >= len(self._rows):
            return None
        self.row = child
        self.num_accepted += 1
        logits: Logits = self._rows[child]
        return logits


class _Share:
    """How often something was so; recent times count more."""

    __slots__ = ("_right", "_tried")

    def __init__(self) -> None:
        self._tried = self._right = 0.0

    def count(self, is_right: bool) -> None:
        self._tried = MEMORY * self._tried + 1
        self._right = MEMORY * self._right + is_right

    def expected(self, prior: float) -> float:
        return (self._right + PRIOR_WEIGHT * prior) / (self._tried + PRIOR_WEIGHT)


class Acceptance:
    """How often each position of a proposal is right where all before it were; recent ones count more.

    `prior` is believed of the first position before anything is counted. Of what was proposed beside a
    token, it counts how often that came where the token itself did not.
    """

    def __init__(self, num_positions: int, prior: float) -> None:
        self._prior = prior
        self._positions = [_Share() for _ in range(num_positions)]
        self._others = _Share()

    def count(self, num_right: int, num_wrong: int) -> None:
        """Count a proposal whose first `num_right` tokens came; then, with `num_wrong` 1, another did."""
        for position, share in enumerate(self._positions[: num_right + num_wrong]):
            share.count(position < num_right)

    def count_other(self, *, is_right: bool) -> None:
        """Count a wrong token beside which there was another."""
        self._others.count(is_right)

    def by_position(self) -> tuple[float, ...]:
        """Return the share that was right; what is not known is nearly as the position before."""
        shares = []
        expected = self._prior
        for share in self._positions:
            expected = share.expected(expected)
            shares.append(expected)
            expected *= PRIOR_OF_NEXT
        return tuple(shares)

    @property
    def of_others(self) -> float:
        """How often the next token beside a wrong one is right."""
        return self._others.expected(PRIOR_OF_OTHERS)


def chances(tree: TokenTree, acceptance: Acceptance) -> list[float]:
    """Return how often each row of a proposal is accepted, itself and its whole path."""
    positions = acceptance.by_position()
    reached: list[float] = []
    missed: dict[int, float] = {}
    """Of each row, how often none of those after it that were looked at is right."""
    for parent, depth in zip(tree.parents, tree.depths(), strict=True):
        left = missed.get(parent)
        share = positions[min(depth, len(positions) - 1)] if left is None else acceptance.of_others
        left = 1.0 if left is None else left
        reached.append((1.0 if parent == TEXT else reached[parent]) * left * share)
        missed[parent] = left * (1 - share)
    return reached


MOST_STRETCHES = 64
"""Stretches of rounds of equal size that are kept: the last ones."""


class SpeculationRecord:
    """Rounds, tokens and seconds."""

    def __init__(self) -> None:
        self.num_rounds = self._num_drafted = self._num_accepted = self._num_on_branches = 0
        self._drafting_s = self._verifying_s = 0.0
        self._by_draft = Counter[str]()
        self._stretches: list[list[int]] = []

    def drafting(self, seconds: float) -> None:
        """Drafts were asked, whether they had anything to say or not."""
        self._drafting_s += seconds

    def drafted(self, name: str, num_tokens: int) -> None:
        """A round begins with so many tokens of a draft."""
        self.num_rounds += 1
        self._num_drafted += num_tokens
        self._by_draft[name] += 1
        num_rows = num_tokens + 1
        if self._stretches and self._stretches[-1][0] == num_rows:
            self._stretches[-1][1] += 1
        else:
            self._stretches = [*self._stretches, [num_rows, 1]][-MOST_STRETCHES:]

    def verified(self, seconds: float) -> None:
        """Its pass took so long."""
        self._verifying_s += seconds

    def accepted(self, *, on_branch: bool) -> None:
        """A drafted token was right."""
        self._num_accepted += 1
        self._num_on_branches += on_branch

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON; `rows` has pairs of rows and rounds, in order, the last ones."""
        rounds = self.num_rounds
        return {
            "rounds": rounds,
            "drafted": self._num_drafted,
            "accepted": self._num_accepted,
            "accepted_on_branches": self._num_on_branches,
            "mean_accepted": self._num_accepted / rounds if rounds else None,
            "drafting_s": self._drafting_s,
            "verifying_s": self._verifying_s,
            "rows": [tuple(stretch) for stretch in self._stretches],
            "rounds_by_draft": dict(self._by_draft),
        }
