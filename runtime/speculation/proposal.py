"""DraftProposal: what a draft of one sequence proposes, and what verifying it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.memory.plan.batch import RowShares, share_rows
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.acceptance import Acceptance
from lowtide.runtime.speculation.step_cost import StepCostModel

MIN_GAIN = 1.04
"""Expected speed of a verifying pass, in multiples of a pass without drafts, from which it is done."""


@dataclass(frozen=True, slots=True)
class DraftProposal:
    """What a draft proposes: the rows of a tree, in the order in which they are verified.

    `chances[i]` is the probability that `rows[i]` is accepted with its whole path; `seconds[i]` is the time that
    proposing it takes, where that counts (a draft model). All of the proposal took `drafting_s` seconds.
    """

    draft: str
    confidence: int
    tree: TokenTree
    acceptance: Acceptance
    rows: tuple[int, ...]
    chances: tuple[float, ...]
    seconds: tuple[float, ...]
    drafting_s: float

    def first(self, num_rows: int) -> TokenTree:
        """Return the tree of the first `num_rows` rows."""
        return self.tree.of_rows(sorted(self.rows[:num_rows]))


def share(
    proposals: Sequence[DraftProposal | None], costs: StepCostModel, max_rows: int
) -> RowShares:
    """Return how many rows of each proposal one pass of at most `max_rows` tokens verifies."""
    return share_rows(
        [one.chances if one else () for one in proposals],
        costs.of,
        max_rows=max_rows,
        min_gain=MIN_GAIN,
        seconds=[one.seconds if one else () for one in proposals],
    )


def gain_alone(proposal: DraftProposal, costs: StepCostModel) -> float:
    """Return the highest speed that rows of one sequence's proposal promise."""
    return share([proposal], costs, costs.max_tokens).gain or 0.0


def num_expected(proposal: DraftProposal) -> float:
    """Return how many tokens a proposal promises if all of it is verified, with the one that is no draft."""
    return sum(proposal.chances, 1.0)
