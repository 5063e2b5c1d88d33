"""What is verified and what is not: chosen by what came before and by what passes cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from speculating import CHEAP, DEAR, Ticks, ToldDraft

from lowtide.memory.plan.speculation import CostCurve
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.acceptance import Acceptance, DraftVerification, chances
from lowtide.runtime.speculation.control import FIRST_WASTE_S, WASTED_SHARE, SpeculationControl
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.speculation.step_cost import StepCostModel

MODERATE = CostCurve(num_rows=(1, 2, 4, 8), seconds=(1.0, 1.4, 2.2, 3.5))


class OftenRight(Draft):
    """Proposes eight tokens, of which each is right with a chance that can change."""

    name = "often"

    def __init__(self, chance: float, *, clock: Ticks | None = None, takes_s: float = 0.0) -> None:
        self.chance = chance
        self.num_asked = 0
        self._random = random.Random(1)
        self._clock, self._takes_s = clock, takes_s
        self.is_free = not takes_s

    def follow(self, token_ids: Sequence[int]) -> None:
        self._at = len(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        self.num_asked += 1
        if self._clock is not None:
            self._clock.now += self._takes_s * num_tokens
        return Proposal.chain(
            tuple(
                self._at + i if self._random.random() < self.chance else -1
                for i in range(num_tokens)
            )
        )


def simulated(control: SpeculationControl, clock: Ticks, cost: CostCurve, num_tokens: int) -> float:
    """Decode the text 0, 1, 2, ... and return by how much it was faster than plain steps."""
    started, text = clock.now, [0]
    while len(text) < num_tokens:
        chosen = control.chosen(text, 8)
        drafted = chosen[1].token_ids if chosen else ()
        clock.now += cost.of(len(drafted) + 1)
        control.passed(len(drafted) + 1, cost.of(len(drafted) + 1))
        num_before = len(text)
        for token_id in (*drafted, -2):
            came = len(text)
            control.observe_token(came)
            text.append(came)
            if token_id != came:
                break
        if drafted:
            control.end_round(len(text) - num_before, cost.of(len(drafted) + 1))
    return (len(text) - 1) * cost.of(1) / (clock.now - started)


def controlled(cost: CostCurve, chance: float, takes_s: float = 0.0) -> tuple[float, OftenRight]:
    clock = Ticks()
    draft = OftenRight(chance, clock=clock, takes_s=takes_s)
    control = SpeculationControl([draft], StepCostModel(cost, clock))
    return simulated(control, clock, cost, 1500), draft


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [CHEAP, MODERATE, DEAR])
def test_it_is_never_more_than_three_percent_slower(cost: CostCurve, chance: float) -> None:
    assert controlled(cost, chance)[0] >= 0.97


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_nor_with_a_draft_that_takes_as_long_as_a_third_of_a_step(chance: float) -> None:
    assert controlled(DEAR, chance, takes_s=0.33)[0] >= 0.97


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.65, 0.8])
def test_nor_on_average_over_short_answers(chance: float) -> None:
    speeds = []
    for seed in range(40):
        clock = Ticks()
        draft = OftenRight(chance)
        draft._random.seed(seed)
        control = SpeculationControl([draft], StepCostModel(MODERATE, clock))
        speeds.append(simulated(control, clock, MODERATE, 60))
    assert sum(speeds) / len(speeds) >= 0.97 and min(speeds) >= 0.9


def test_it_gains_most_of_what_can_be_gained() -> None:
    chance = 0.9
    best = max(sum(chance**i for i in range(rows)) / MODERATE.of(rows) for rows in range(1, 9))
    assert controlled(MODERATE, chance)[0] >= 0.9 * best > 1.2


def test_it_turns_itself_off_and_on_again_with_the_text() -> None:
    clock = Ticks()
    draft = OftenRight(0.95)
    control = SpeculationControl([draft], StepCostModel(MODERATE, clock))
    assert simulated(control, clock, MODERATE, 400) > 1.2
    draft.chance = 0.0
    simulated(control, clock, MODERATE, 100)
    assert control.chosen([0], 8) is None
    draft.chance = 0.95
    simulated(control, clock, MODERATE, 200)
    assert simulated(control, clock, MODERATE, 300) > 1.2


def test_the_better_of_two_drafts_is_taken() -> None:
    clock = Ticks()
    poor, good = OftenRight(0.3), OftenRight(0.9)
    good.name = "good"  # type: ignore[misc]
    control = SpeculationControl([poor, good], StepCostModel(MODERATE, clock))
    simulated(control, clock, MODERATE, 300)
    chosen = control.chosen([0], 8)
    assert chosen is not None and chosen[0] == "good"


def test_time_that_comes_to_nothing_is_bounded_and_then_the_draft_is_not_asked() -> None:
    _, draft = controlled(DEAR, 0.5, takes_s=0.33)
    most_s = FIRST_WASTE_S + WASTED_SHARE * 1500
    assert 0 < draft.num_asked <= most_s / (0.33 * 7) + 1


def test_no_more_rows_than_there_is_room_for() -> None:
    control = SpeculationControl([OftenRight(1.0)], StepCostModel(CHEAP, Ticks()))
    for room in (8, 5, 2):
        chosen = control.chosen([0], room)
        assert chosen is not None and 1 <= len(chosen[1]) <= room - 1
    assert control.chosen([0], 1) is None and control.chosen([0], 0) is None


def test_a_draft_that_claims_a_class_that_it_has_not_is_not_heard() -> None:
    draft = ToldDraft(lambda text: (1, 2))
    draft.propose = lambda num_tokens: Proposal.chain((1, 2), confidence=7)  # type: ignore[method-assign]
    assert SpeculationControl([draft], StepCostModel(CHEAP, Ticks())).chosen([0], 8) is None


def test_acceptance_is_counted_by_position() -> None:
    acceptance = Acceptance(3, 0.4)
    first, *others = acceptance.by_position()
    assert first == pytest.approx(0.4) and first > others[0] > others[1] > 0
    for _ in range(200):
        acceptance.count(2, 1)
    first, second, third = acceptance.by_position()
    assert first > 0.9 and second > 0.9 and third < 0.15
    for _ in range(200):
        acceptance.count(0, 1)
    assert acceptance.by_position()[0] < 0.1


def test_a_walk_through_a_verification() -> None:
    import numpy as np

    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    walk = DraftVerification(TokenTree.chain((4, 5, 6)), rows)
    assert walk.first is not None and (walk.first == rows[0]).all()
    row = walk.accept(5)
    assert row is not None and (row == rows[1]).all()
    assert walk.accept(9) is None
    row = walk.accept(6)
    assert row is not None and (row == rows[2]).all()
    assert walk.accept(7) is None and walk.num_accepted == 2


def test_a_walk_onto_a_branch() -> None:
    import numpy as np

    rows = np.arange(16, dtype=np.float32).reshape(4, 4)
    tree = TokenTree((4, 5, 6, 7), (-1, 0, 1, 0))
    walk = DraftVerification(tree, rows)
    logits = walk.accept(7)
    assert logits is not None and (logits == rows[3]).all()
    assert walk.row == 3 and walk.is_branch and walk.accept(6) is None
    # Where branches could not be computed there are rows of the trunk alone.
    alone = DraftVerification(tree, rows[:3])
    assert alone.accept(7) is None and alone.row == 0
    assert alone.accept(5) is not None and not alone.is_branch


class SecondIsRight(Draft):
    """Proposes two tokens for each of four places, of which the first is right with a chance."""

    name = "second"

    def __init__(self, chance: float) -> None:
        self._chance = chance
        self._random = random.Random(2)

    def follow(self, token_ids: Sequence[int]) -> None:
        self._at = len(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        token_ids, parents, last = list[int](), list[int](), -1
        for place in range(min(num_tokens, 4)):
            right, wrong = self._at + place, -1
            is_first = self._random.random() < self._chance
            parents += (last, last)
            last = len(token_ids)
            token_ids += (right, wrong) if is_first else (wrong, right)
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)))


def branched(chance: float, *, branches: bool) -> tuple[float, TokenTree]:
    """The gain over a text, and what is verified at its end."""
    clock = Ticks()
    draft = SecondIsRight(chance)
    control = SpeculationControl([draft], StepCostModel(CHEAP, clock), branches=branches)
    text, started = [0], clock.now
    while len(text) < 600:
        chosen = control.chosen(text, 8)
        tree = (chosen[1] if chosen else TokenTree((), ())).behind(text[-1]).trunk_first()
        clock.now += CHEAP.of(len(tree))
        control.passed(len(tree), CHEAP.of(len(tree)))
        row: int | None = 0
        num_before = len(text)
        while row is not None:
            came = len(text)
            control.observe_token(came)
            text.append(came)
            row = tree.child(row, came)
        control.end_round(len(text) - num_before, CHEAP.of(len(tree)))
    return (len(text) - 1) / (clock.now - started), tree


def test_branches_are_verified_where_the_second_token_is_often_right() -> None:
    without, chain = branched(0.5, branches=False)
    gain, tree = branched(0.5, branches=True)
    assert len(chain) == chain.trunk_rows and len(tree) > tree.trunk_rows
    assert gain > 1.3 * without
    # A chain that is always right leaves nothing for what stands beside it.
    assert branched(1.0, branches=True)[1].trunk_rows == 5


def test_each_tree_is_the_one_before_with_its_next_likeliest_row() -> None:
    acceptance = Acceptance(4, 0.6)
    for i in range(200):
        acceptance.count(i % 4, 1)
        acceptance.count_other(is_right=i % 2 == 0)
    draft = SecondIsRight(1.0)
    draft.follow([0])
    tree = draft.propose(4).tree
    reached = chances(tree, acceptance)
    by_position = acceptance.by_position()
    assert reached[0] == pytest.approx(by_position[0])
    assert reached[1] == pytest.approx((1 - by_position[0]) * acceptance.of_others)
    assert reached[2] == pytest.approx(by_position[0] * by_position[1])
    assert all(
        reached[row] <= reached[parent] for row, parent in enumerate(tree.parents) if parent >= 0
    )


def test_costs_follow_the_machine_and_forgive_one_slow_pass() -> None:
    costs = StepCostModel(MODERATE)
    for _ in range(60):
        costs.observe(1, 2.0)
    assert costs.of(1) == pytest.approx(2.0, rel=0.02)
    assert costs.of(4) == pytest.approx(4.4, rel=0.02)
    costs.observe(4, 400.0)
    assert costs.of(4) < 1.1 * 4.4
    for _ in range(600):
        costs.observe(1, 2.0)
    assert costs.of(4) == pytest.approx(4.4, rel=0.02)


def test_what_another_day_measured_is_soon_forgotten() -> None:
    costs = StepCostModel(MODERATE)
    for _ in range(4):
        costs.observe(1, 0.6)
    assert costs.of(1) == pytest.approx(0.6, rel=0.15)
    assert costs.of(4) == pytest.approx(2.2 * costs.of(1), rel=0.01)


def test_after_a_loss_verifying_waits_until_it_is_a_small_share_of_the_time() -> None:
    control = SpeculationControl([OftenRight(1.0)], StepCostModel(CHEAP, Ticks()))
    assert control.chosen([0], 8) is not None
    control.end_round(1, 6.0)
    assert control.has_lost and control.chosen([0], 8) is None
    for _ in range(600):
        control.passed(1, 1.0)
    assert not control.has_lost and control.chosen([0], 8) is not None
    control.end_round(100, 1.0)
    control.end_round(1, 3.0)
    assert not control.has_lost
