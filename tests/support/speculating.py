"""Drafts that say what they are told to, and a speculator over a fake model with costs of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from lowtide import FakeModel
from lowtide.memory.plan.speculation import CostCurve
from lowtide.models.draft_tree import TEXT, TokenTree
from lowtide.runtime.speculation.control import SpeculationControl
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.speculation.speculator import Speculator
from lowtide.runtime.speculation.step_cost import StepCostModel

CHEAP = CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1))
"""Rows cost next to nothing, so that everything is verified."""
DEAR = CostCurve(num_rows=(1, 8), seconds=(1.0, 8.0))
"""Every row costs a pass: nothing pays."""


class ToldDraft(Draft):
    """Proposes what a function of the text says."""

    name = "told"

    def __init__(self, told: Callable[[Sequence[int]], Sequence[int]]) -> None:
        self._told = told
        self._text: list[int] = []
        self.is_closed = False

    def follow(self, token_ids: Sequence[int]) -> None:
        self._text = list(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        return Proposal.chain(tuple(self._told(self._text))[:num_tokens])

    def close(self) -> None:
        self.is_closed = True


class BranchingDraft(Draft):
    """Proposes trees that a function of the text makes."""

    name = "branching"

    def __init__(self, told: Callable[[Sequence[int]], TokenTree]) -> None:
        self._told = told
        self._text: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        self._text = list(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        return Proposal(self._told(self._text))


class Ticks:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def speculator_of(
    *drafts: Draft, cost: CostCurve = CHEAP, most_rows: int = 8, clock: Ticks | None = None
) -> Speculator:
    control = SpeculationControl(drafts, StepCostModel(cost, clock or Ticks()), branches=True)
    return Speculator(
        drafts,
        control,
        most_rows=most_rows,
        vocabulary_size=FakeModel().spec.vocabulary.num_tokens,
    )


def mixed_tree(
    rest: Sequence[int], seed: int, *, num_rows: int = 7, num_tokens: int = 259
) -> TokenTree:
    """A tree of any shape in which some path begins as `rest` does, and other tokens stand beside it."""
    chance = random.Random(seed)
    token_ids, parents, right = list[int](), list[int](), {TEXT: 0}
    """Of each row that is right so far, how many tokens of the rest it has said."""
    for row in range(chance.randint(1, num_rows)):
        parent = chance.randrange(-1, row)
        at = right.get(parent)
        if at is not None and at < len(rest) and chance.random() < 0.7:
            token_ids.append(rest[at])
            right[row] = at + 1
        else:
            token_ids.append(chance.randrange(num_tokens))
        parents.append(parent)
    return TokenTree(tuple(token_ids), tuple(parents))
