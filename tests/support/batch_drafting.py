"""Batches that draft what a test tells them to, with costs of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from speculating import Ticks, ToldDraft

from lowtide.attention.policy import PassController
from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.speculation import CostCurve
from lowtide.models.fake_model import FakeSequences
from lowtide.models.model import SequenceBatch, SequenceSlice
from lowtide.runtime.batch import api as batch_answers
from lowtide.runtime.batch.speculation import BatchSpeculation, SequenceSpeculation
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.speculation.control import SpeculationControl
from lowtide.runtime.speculation.drafts import Draft
from lowtide.runtime.speculation.step_cost import StepCostModel

CHEAP = CostCurve(num_rows=(1, 64), seconds=(1.0, 1.1))
"""Rows cost next to nothing, so that everything is verified."""
FAIR = CostCurve(num_rows=(1, 64), seconds=(1.0, 7.3))
"""Ten rows cost a pass: what is often right pays."""
DEAR = CostCurve(num_rows=(1, 64), seconds=(1.0, 64.0))
"""Every row costs a pass: nothing pays."""


def draft_in_batches(
    monkeypatch: pytest.MonkeyPatch,
    drafts_of: Callable[[int], Sequence[Draft]],
    expected: CostCurve = CHEAP,
    cost: CostCurve | None = None,
) -> None:
    """Have batches draft with what `drafts_of` returns for a member.

    Passes are taken to cost what is `expected`; they do so, unless `cost` says otherwise.
    """
    clock, forward = Ticks(), FakeSequences.forward

    def ticking(sequences: FakeSequences, parts: Sequence[SequenceSlice]) -> Any:
        clock.now += (cost or expected).of(sum(len(part.token_ids) for part in parts))
        return forward(sequences, parts)

    def load(
        planned: ResolvedModel,
        plan: BatchPlan,
        _sequences: SequenceBatch,
        _controller: PassController,
    ) -> BatchSpeculation | None:
        if not plan.most_drafted:
            return None
        rows = tuple(sorted({1, plan.num_sequences, plan.num_logits}))
        seconds = tuple(expected.of(num_rows) for num_rows in rows)
        costs = StepCostModel(CostCurve(num_rows=rows, seconds=seconds), clock)
        members = [_member(drafts_of(i), costs, planned) for i in range(plan.num_sequences)]
        return BatchSpeculation(members, costs, rows_agree=True)

    monkeypatch.setattr(FakeSequences, "forward", ticking)
    monkeypatch.setattr(batch_answers, "load_batch_speculation", load)


def _member(
    drafts: Sequence[Draft], costs: StepCostModel, planned: ResolvedModel
) -> SequenceSpeculation:
    return SequenceSpeculation(
        drafts,
        SpeculationControl(drafts, costs),
        most_drafted=planned.plan.verify_batch - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
    )


def knowing(tokens: Sequence[int]) -> ToldDraft:
    """A draft that knows what comes behind the text's last newline."""

    def rest(text: Sequence[int]) -> Sequence[int]:
        said = list(reversed(text)).index(ord("\n"))
        return tokens[said:]

    return ToldDraft(rest)


def half_knowing(tokens: Sequence[int], seed: int) -> ToldDraft:
    """One that is right for a random number of tokens and then says anything, also what is no token."""
    chance, right = random.Random(seed), knowing(tokens)

    def mixed(text: Sequence[int]) -> Sequence[int]:
        right.follow(text)
        rest = right.propose(chance.randrange(6)).token_ids
        least, most = chance.choice(((0, 259), (-3, 300)))
        return (*rest, *(chance.randrange(least, most) for _ in range(chance.randrange(5))))

    return ToldDraft(mixed)
