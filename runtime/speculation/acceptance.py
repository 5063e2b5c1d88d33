"""Verification of drafts against the target's logits, and how often drafts are right.

A token is sampled from a verified row as it would be without drafts, by the same random draw, and a draft counts
if it is that very token. So greedy and sampled answers are those of the plain loop, token for token, with any
penalties. For a draft of fixed tokens this is speculative rejection sampling: x is accepted with the target's
own probability q(x), and otherwise the token is drawn from q without x. A tree of drafts is verified one child
after the other (recursive rejection sampling without replacement: the second child is accepted with
q(y) / (1 - q(x)) where the first was rejected), so the distribution is exact there, too.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lowtide.memory.plan.speculation.allocator import DraftRates
from lowtide.models.draft_tree import TEXT, TokenTree

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


DECAY = 0.96
"""Weight of an observation after each later one: acceptance follows the last 25 proposals or so."""
PRIOR_WEIGHT = 3.0
"""Number of proposals that a draft's prior acceptance rate counts for."""
NEXT_POSITION_PRIOR = 0.9
"""Prior acceptance of the next position, as a share of the position before."""
SIBLING_PRIOR = 0.2
"""Prior acceptance of a sibling of a rejected draft; deliberately low."""


class DraftVerification:
    """Walks a verified tree from one accepted token to the next.

    Row 0 of `tree` is the last sampled token, the others are drafts. `rows` are the logits of the tree's first
    rows, shape (rows, vocabulary); a draft without logits cannot be accepted.
    """

    def __init__(self, tree: TokenTree, rows: Logits2D) -> None:
        self._tree = tree
        self._rows = rows
        self.row = 0
        """The row of the last accepted token."""

    @property
    def num_drafted(self) -> int:
        """Drafts that were verified."""
        return len(self._tree) - 1

    @property
    def first(self) -> Logits:
        """Logits after row 0, shape (vocabulary,)."""
        row: Logits = self._rows[0]
        return row

    @property
    def is_branch(self) -> bool:
        """Whether the last accepted token is outside the trunk."""
        return self.row >= self._tree.trunk_rows

    def accept(self, token_id: int) -> Logits | None:
        """Return the logits after `token_id`, which was sampled; None where it was not drafted."""
        child = self._tree.child(self.row, token_id)
        if child is None or child >= len(self._rows):
            return None
        self.row = child
        logits: Logits = self._rows[child]
        return logits


class _Rate:
    """A share of successes in which recent observations count more."""

    __slots__ = ("_successes", "_trials")

    def __init__(self) -> None:
        self._trials = self._successes = 0.0

    def count(self, is_success: bool) -> None:
        self._trials = DECAY * self._trials + 1
        self._successes = DECAY * self._successes + is_success

    def expected(self, prior: float) -> float:
        return (self._successes + PRIOR_WEIGHT * prior) / (self._trials + PRIOR_WEIGHT)


class Acceptance:
    """Acceptance rates by position: how often a draft is right where all drafts before it were.

    `prior` is the rate of the first position before anything is counted.
    """

    def __init__(self, num_positions: int, prior: float, known: DraftRates | None = None) -> None:
        self._prior = prior
        self._known = known.acceptance if known is not None else ()
        self._sibling_prior = known.siblings if known is not None else SIBLING_PRIOR
        self._positions = [_Rate() for _ in range(num_positions)]
        self._siblings = _Rate()

    def count(self, num_right: int, num_wrong: int) -> None:
        """Count a proposal whose first `num_right` tokens were right and whose next `num_wrong` (0 or 1) not."""
        for position, rate in enumerate(self._positions[: num_right + num_wrong]):
            rate.count(position < num_right)

    def count_sibling(self, *, is_right: bool) -> None:
        """Count a sibling of a token that was wrong."""
        self._siblings.count(is_right)

    def by_position(self) -> tuple[float, ...]:
        """Return the expected rate of each position; an unknown one is a little below the one before."""
        rates = []
        expected = self._prior
        for position, rate in enumerate(self._positions):
            if position < len(self._known):
                expected = self._known[position]
            expected = rate.expected(expected)
            rates.append(expected)
            expected *= NEXT_POSITION_PRIOR
        return tuple(rates)

    @property
    def of_siblings(self) -> float:
        """Expected rate of a sibling where the token before it was wrong."""
        return self._siblings.expected(self._sibling_prior)


def chances(tree: TokenTree, acceptance: Acceptance) -> list[float]:
    """Return the probability that each row of a proposal is accepted, with its whole path."""
    positions = acceptance.by_position()
    reached: list[float] = []
    # By parent: the probability that none of its children so far is right.
    missed: dict[int, float] = {}
    for parent, depth in zip(tree.parents, tree.depths(), strict=True):
        left = missed.get(parent)
        rate = positions[min(depth, len(positions) - 1)] if left is None else acceptance.of_siblings
        left = 1.0 if left is None else left
        reached.append((1.0 if parent == TEXT else reached[parent]) * left * rate)
        missed[parent] = left * (1 - rate)
    return reached


MAX_RUNS = 64
"""Runs of rounds of equal size that the record holds; older ones are dropped."""


class SpeculationRecord:
    """Counts the rounds, tokens and seconds of one answer."""

    def __init__(self) -> None:
        self.num_rounds = self._num_drafted = self._num_accepted = self._num_on_branches = 0
        self._drafting_s = self._verifying_s = 0.0
        self._by_draft = Counter[str]()
        self._runs: list[list[int]] = []

    def add_drafting(self, seconds: float) -> None:
        """Add the time of asking the drafts, with or without a proposal."""
        self._drafting_s += seconds

    def add_round(self, draft: str, num_tokens: int) -> None:
        """Add a round that verifies `num_tokens` tokens of a draft."""
        self.num_rounds += 1
        self._num_drafted += num_tokens
        self._by_draft[draft] += 1
        num_rows = num_tokens + 1
        if self._runs and self._runs[-1][0] == num_rows:
            self._runs[-1][1] += 1
        else:
            self._runs = [*self._runs, [num_rows, 1]][-MAX_RUNS:]

    def add_verifying(self, seconds: float) -> None:
        """Add the time of a verifying pass."""
        self._verifying_s += seconds

    def add_accepted(self, *, on_branch: bool) -> None:
        """Add an accepted draft."""
        self._num_accepted += 1
        self._num_on_branches += on_branch

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON; `rows` are pairs of tokens a pass and rounds in a row, the last ones."""
        rounds = self.num_rounds
        return {
            "rounds": rounds,
            "drafted": self._num_drafted,
            "accepted": self._num_accepted,
            "accepted_on_branches": self._num_on_branches,
            "mean_accepted": self._num_accepted / rounds if rounds else None,
            "drafting_s": self._drafting_s,
            "verifying_s": self._verifying_s,
            "rows": [tuple(run) for run in self._runs],
            "rounds_by_draft": dict(self._by_draft),
        }
