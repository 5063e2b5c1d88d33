"""What one answer of a batch offers, and what it learns of what became of that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from speculating import Ticks, ToldDraft

from lowtide.memory.plan.speculation import CostCurve
from lowtide.runtime.batch.speculation import SequenceSpeculation
from lowtide.runtime.speculation.control import (
    FIRST_WASTE_S,
    WASTED_SHARE,
    SpeculationControl,
)
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.speculation.step_cost import StepCostModel

CURVE = CostCurve(num_rows=(1, 8), seconds=(1.0, 2.0))


def speculation_of(*drafts: Draft, clock: Ticks | None = None) -> SequenceSpeculation:
    control = SpeculationControl(drafts, StepCostModel(CURVE, clock or Ticks()))
    return SequenceSpeculation(drafts, control, most_drafted=5, vocabulary_size=100)


class Sure(ToldDraft):
    """A draft that is believed from the start."""

    name = "sure"

    def prior(self, confidence: int) -> float:
        return 0.9


def test_what_promises_the_most_tokens_is_offered() -> None:
    long, sure = ToldDraft(lambda _: (1, 2, 3, 4, 5)), Sure(lambda _: (7, 8))
    speculation = speculation_of(long, sure)
    expected = speculation.take_proposal([0], 9)
    assert len(expected) == 2 and expected[0] == pytest.approx(0.9)
    assert speculation.taken(1, 1.5) == (7,)
    stats = speculation.statistics(None)
    assert (stats["rounds"], stats["drafted"], stats["rounds_by_draft"]) == (1, 1, {"sure": 1})


def test_no_more_is_offered_than_there_is_room_for() -> None:
    speculation = speculation_of(ToldDraft(lambda _: range(30)))
    assert [len(speculation.take_proposal([0], free)) for free in (9, 3, 1, 0, -1)] == [
        5,
        3,
        1,
        0,
        0,
    ]
    assert speculation.taken(0, None) == ()


@pytest.mark.parametrize("wrong", [(3, 100), (-1,)])
def test_what_is_no_token_is_not_offered(wrong: Sequence[int]) -> None:
    speculation = speculation_of(ToldDraft(lambda _: wrong))
    assert not speculation.take_proposal([0], 9)
    assert speculation.statistics(None)["off_reason"] == "no draft had anything to propose"


def test_acceptance_is_counted_also_where_nothing_is_verified() -> None:
    speculation = speculation_of(ToldDraft(lambda text: ((text[-1] + 1) % 50,)))
    first = speculation.take_proposal([0], 9)[0]
    for token_id in range(1, 20):
        speculation.taken(0, 0.9)
        speculation.observe_token(token_id, is_accepted=False)
        last = speculation.take_proposal([token_id], 9)[0]
    assert first == pytest.approx(0.3) and last > 0.8
    stats = speculation.statistics("a reason")
    assert stats["off_reason"].endswith("0.90 x a pass without drafts")
    assert (stats["identical"], stats["nondeterminism"]) == (False, "a reason")


def test_drafts_waste_no_more_than_a_share_of_this_answers_part_of_the_passes() -> None:
    clock = Ticks()
    asked: list[int] = []

    class Slow(ToldDraft):
        def propose(self, num_tokens: int) -> Proposal:
            clock.now += FIRST_WASTE_S
            asked.append(num_tokens)
            return super().propose(num_tokens)

    part_s = FIRST_WASTE_S / WASTED_SHARE / 10  # of a pass; ten of them pay for a proposal
    speculation = speculation_of(Slow(lambda _: (1, 2)), clock=clock)
    for _ in range(100):
        speculation.take_proposal([0], 9)
        speculation.taken(0, 1.0)
        speculation.passed(8 * part_s, num_members=8, has_drafts=False)
    assert 10 <= len(asked) <= 12
    assert speculation.statistics(None)["drafting_s"] == pytest.approx(len(asked) * FIRST_WASTE_S)
