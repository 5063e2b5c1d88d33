"""What is verified and what is not: decided by earlier acceptance and by what passes cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from speculating import CHEAP, DEAR, ScriptedDraft, Ticks

from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.acceptance import Acceptance, DraftVerification, chances
from lowtide.runtime.speculation.controller import (
    FREE_LOSS_STEPS,
    SpeculationController,
)
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.speculation.sequence_drafts import FREE_WASTE_S, WASTED_SHARE
from lowtide.runtime.speculation.step_cost import StepCostModel

MODERATE = CostCurve(num_rows=(1, 2, 4, 8), seconds=(1.0, 1.4, 2.2, 3.5))
VOCABULARY = 1 << 20
WRONG = VOCABULARY - 1
"""A token that never comes: the texts of these tests are 0, 1, 2, ..."""


class OftenRight(Draft):
    """Proposes a chain in which each token is right with a probability that can change."""

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
                self._at + i if self._random.random() < self.chance else WRONG
                for i in range(num_tokens)
            )
        )


def controller_of(
    *drafts: Draft,
    cost: CostCurve,
    clock: Ticks | None = None,
    trees: bool = False,
    num_sequences: int = 1,
    max_draft: int = 7,
) -> SpeculationController:
    return SpeculationController(
        [drafts] * num_sequences,
        StepCostModel(cost, clock or Ticks()),
        max_draft=max_draft,
        vocabulary_size=VOCABULARY,
        trees=trees,
    )


def proposed(
    controller: SpeculationController, text: Sequence[int] = (0,), room: int = 7
) -> TokenTree:
    (tree,) = controller.propose([(0, text, room)])
    return tree


def simulate(
    controller: SpeculationController, clock: Ticks, cost: CostCurve, num_tokens: int
) -> float:
    """Decode the text 0, 1, 2, ... and return the speed in multiples of the plain loop's."""
    started, text = clock.now, [0]
    while len(text) < num_tokens:
        tree = proposed(controller, text).with_root(text[-1]).trunk_first()
        clock.now += cost.of(len(tree))
        controller.record_step([(0, len(tree) - 1)], cost.of(len(tree)))
        num_before, row = len(text), 0
        while row is not None:
            token_id = len(text)
            row = tree.child(row, token_id)
            controller.observe_token(0, token_id, is_accepted=row is not None, on_branch=False)
            text.append(token_id)
        controller.end_round(len(text) - num_before)
    return (len(text) - 1) * cost.of(1) / (clock.now - started)


def speed(cost: CostCurve, chance: float, takes_s: float = 0.0) -> tuple[float, OftenRight]:
    clock = Ticks()
    draft = OftenRight(chance, clock=clock, takes_s=takes_s)
    return simulate(controller_of(draft, cost=cost, clock=clock), clock, cost, 1500), draft


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [CHEAP, MODERATE, DEAR])
def test_it_is_never_more_than_three_percent_slower(cost: CostCurve, chance: float) -> None:
    assert speed(cost, chance)[0] >= 0.97


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_nor_with_a_draft_that_takes_a_third_of_a_pass(chance: float) -> None:
    assert speed(DEAR, chance, takes_s=0.33)[0] >= 0.97


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.65, 0.8])
def test_nor_on_average_over_short_answers(chance: float) -> None:
    speeds = []
    for seed in range(40):
        clock, draft = Ticks(), OftenRight(chance)
        draft._random.seed(seed)
        controller = controller_of(draft, cost=MODERATE, clock=clock)
        speeds.append(simulate(controller, clock, MODERATE, 60))
    assert sum(speeds) / len(speeds) >= 0.97 and min(speeds) >= 0.9


def test_it_gains_most_of_what_can_be_gained() -> None:
    chance = 0.9
    best = max(sum(chance**i for i in range(rows)) / MODERATE.of(rows) for rows in range(1, 9))
    assert speed(MODERATE, chance)[0] >= 0.9 * best > 1.2


def test_it_turns_itself_off_and_on_again_with_the_text() -> None:
    clock, draft = Ticks(), OftenRight(0.95)
    controller = controller_of(draft, cost=MODERATE, clock=clock)
    assert simulate(controller, clock, MODERATE, 400) > 1.2
    draft.chance = 0.0
    simulate(controller, clock, MODERATE, 100)
    assert not len(proposed(controller))
    draft.chance = 0.95
    simulate(controller, clock, MODERATE, 200)
    assert simulate(controller, clock, MODERATE, 300) > 1.2


def test_the_better_of_two_drafts_is_used() -> None:
    clock, poor, good = Ticks(), OftenRight(0.3), OftenRight(0.9)
    good.name = "good"  # type: ignore[misc]
    controller = controller_of(poor, good, cost=MODERATE, clock=clock)
    simulate(controller, clock, MODERATE, 300)
    controller.begin()
    assert len(proposed(controller))
    assert controller.statistics(0)["rounds_by_draft"] == {"good": 1}


def test_wasted_time_is_bounded_and_then_the_draft_is_not_asked() -> None:
    _, draft = speed(DEAR, 0.5, takes_s=0.33)
    most_s = FREE_WASTE_S + WASTED_SHARE * 1500
    assert 0 < draft.num_asked <= most_s / (0.33 * 7) + 1


def test_a_sequence_of_a_batch_wastes_only_a_share_of_its_part_of_the_passes() -> None:
    clock, part_s = Ticks(), FREE_WASTE_S / WASTED_SHARE / 10  # ten parts pay for a proposal
    draft = OftenRight(1.0, clock=clock, takes_s=FREE_WASTE_S / 5)
    draft.is_free = True
    controller = controller_of(
        draft,
        cost=CostCurve(num_rows=(1, 16), seconds=(1.0, 100.0)),
        clock=clock,
        num_sequences=8,
        max_draft=5,
    )
    for _ in range(100):
        controller.propose([(0, [0], 9)])
        controller.record_step([(i, 0) for i in range(8)], 8 * part_s)
    assert 10 <= draft.num_asked <= 12
    drafting_s = controller.statistics(0)["drafting_s"]
    assert drafting_s == pytest.approx(draft.num_asked * FREE_WASTE_S)


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_no_more_is_proposed_than_there_is_room_for(num_sequences: int) -> None:
    draft = ScriptedDraft(lambda _: range(30))
    cost = CostCurve(num_rows=(1, 64), seconds=(1.0, 1.001))
    for room, expected in ((9, 5), (3, 3), (1, 1), (0, 0), (-1, 0)):
        controller = controller_of(draft, cost=cost, num_sequences=num_sequences, max_draft=5)
        assert len(proposed(controller, room=room)) == expected


class Confident(ScriptedDraft):
    """A draft whose prior acceptance is high."""

    name = "confident"

    def prior(self, confidence: int) -> float:
        return 0.9


def test_in_a_batch_a_sequence_offers_what_promises_the_most_tokens() -> None:
    long, confident = ScriptedDraft(lambda _: (1, 2, 3, 4, 5)), Confident(lambda _: (7, 8))
    controller = controller_of(long, confident, cost=CHEAP, num_sequences=2)
    assert proposed(controller).token_ids == (7, 8)
    stats = controller.statistics(0)
    assert (stats["rounds"], stats["drafted"]) == (1, 2)
    assert stats["rounds_by_draft"] == {"confident": 1}


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("invalid", [(3, VOCABULARY), (-1,)])
def test_invalid_tokens_are_not_proposed(num_sequences: int, invalid: Sequence[int]) -> None:
    controller = controller_of(
        ScriptedDraft(lambda _: invalid), cost=CHEAP, num_sequences=num_sequences
    )
    assert not len(proposed(controller))
    assert controller.statistics(0)["off_reason"] == "no draft had a proposal"


def test_a_proposal_of_an_unknown_confidence_is_ignored() -> None:
    draft = ScriptedDraft(lambda _: (1, 2))
    draft.propose = lambda num_tokens: Proposal.chain((1, 2), confidence=7)  # type: ignore[method-assign]
    assert not len(proposed(controller_of(draft, cost=CHEAP)))


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_acceptance_is_counted_also_where_nothing_is_verified(num_sequences: int) -> None:
    controller = controller_of(
        ScriptedDraft(lambda text: ((text[-1] + 1) % 50,)), cost=DEAR, num_sequences=num_sequences
    )
    gains = []
    for token_id in range(20):
        assert not len(proposed(controller, [token_id]))
        gains.append(controller._sequences[0].best_gain)
        controller.observe_token(0, token_id + 1, is_accepted=False, on_branch=False)
    controller.nondeterminism = "a reason"
    stats = controller.statistics(0)
    assert gains[0] is not None and gains[-1] is not None and gains[-1] > 1.3 * gains[0]
    assert f"promised {gains[-1]:.2f} times the speed of a pass" in stats["off_reason"]
    assert (stats["identical"], stats["nondeterminism"]) == (False, "a reason")


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


def test_a_verification_walks_along_a_chain() -> None:
    import numpy as np

    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    walk = DraftVerification(TokenTree.chain((4, 5, 6)), rows)
    assert walk.first is not None and (walk.first == rows[0]).all()
    row = walk.accept(5)
    assert row is not None and (row == rows[1]).all()
    assert walk.accept(9) is None
    row = walk.accept(6)
    assert row is not None and (row == rows[2]).all()
    assert walk.accept(7) is None


def test_a_verification_walks_onto_a_branch() -> None:
    import numpy as np

    rows = np.arange(16, dtype=np.float32).reshape(4, 4)
    tree = TokenTree((4, 5, 6, 7), (-1, 0, 1, 0))
    walk = DraftVerification(tree, rows)
    logits = walk.accept(7)
    assert logits is not None and (logits == rows[3]).all()
    assert walk.row == 3 and walk.is_branch and walk.accept(6) is None
    # Where branches could not be computed there are logits of the trunk only.
    trunk_only = DraftVerification(tree, rows[:3])
    assert trunk_only.accept(7) is None and trunk_only.row == 0
    assert trunk_only.accept(5) is not None and not trunk_only.is_branch


class SecondIsRight(Draft):
    """Proposes two tokens at each of four depths; the first of them is right with a probability."""

    name = "second"

    def __init__(self, chance: float) -> None:
        self._chance = chance
        self._random = random.Random(2)

    def follow(self, token_ids: Sequence[int]) -> None:
        self._at = len(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        token_ids, parents, last = list[int](), list[int](), -1
        for depth in range(min(num_tokens, 4)):
            right = self._at + depth
            is_first = self._random.random() < self._chance
            parents += (last, last)
            last = len(token_ids)
            token_ids += (right, WRONG) if is_first else (WRONG, right)
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)))


def speed_of_trees(chance: float, *, trees: bool) -> tuple[float, TokenTree]:
    """Return the speed over a text, and what is verified at its end."""
    clock = Ticks()
    controller = controller_of(SecondIsRight(chance), cost=CHEAP, clock=clock, trees=trees)
    gain = simulate(controller, clock, CHEAP, 600)
    return gain, proposed(controller).with_root(0).trunk_first()


def test_branches_are_verified_where_the_second_token_is_often_right() -> None:
    without, chain = speed_of_trees(0.5, trees=False)
    gain, tree = speed_of_trees(0.5, trees=True)
    assert len(chain) == chain.trunk_rows and len(tree) > tree.trunk_rows
    assert gain > 1.3 * without
    # A chain that is always right leaves nothing for its siblings.
    assert speed_of_trees(1.0, trees=True)[1].trunk_rows == 5


def test_the_chance_of_a_row_is_that_of_its_path_and_of_its_siblings_being_wrong() -> None:
    acceptance = Acceptance(4, 0.6)
    for i in range(200):
        acceptance.count(i % 4, 1)
        acceptance.count_sibling(is_right=i % 2 == 0)
    draft = SecondIsRight(1.0)
    draft.follow([0])
    tree = draft.propose(4).tree
    reached = chances(tree, acceptance)
    by_position = acceptance.by_position()
    assert reached[0] == pytest.approx(by_position[0])
    assert reached[1] == pytest.approx((1 - by_position[0]) * acceptance.of_siblings)
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


def test_a_measurement_of_another_day_is_soon_replaced() -> None:
    costs = StepCostModel(MODERATE)
    for _ in range(4):
        costs.observe(1, 0.6)
    assert costs.of(1) == pytest.approx(0.6, rel=0.15)
    assert costs.of(4) == pytest.approx(2.2 * costs.of(1), rel=0.01)


def test_a_pass_may_only_lose_what_the_answer_can_bear() -> None:
    """What is lost counts by the chance that no draft is right; what an answer wins, it may lose again."""
    costs = CostCurve(num_rows=(1, 8), seconds=(1.0, 2.4))
    controller = controller_of(OftenRight(1.0), cost=costs, clock=Ticks())
    chance = OftenRight(1.0).prior(0)
    few = len(proposed(controller))
    assert few > 0 and (costs.of(1 + few) - 1) * (1 - chance) <= FREE_LOSS_STEPS
    controller.record_step([(0, few)], 1.5)
    controller.end_round(1)  # a loss of half a pass: nothing is verified until it is made up for
    assert not len(proposed(controller))
    controller.record_step([(0, few)], 1.0)
    controller.end_round(5)
    assert len(proposed(controller)) >= few
    controller._credit_steps = 8.0
    controller.begin()
    assert controller._credit_steps == FREE_LOSS_STEPS, "no answer pays for what another one won"


def test_after_a_loss_verifying_waits_until_it_is_a_small_share_of_the_time() -> None:
    clock = Ticks()
    controller = controller_of(OftenRight(1.0), cost=CHEAP, clock=clock)

    def step(num_drafted: int, num_tokens: int, seconds: float) -> None:
        controller.record_step([(0, num_drafted)], seconds)
        controller.end_round(num_tokens)

    assert len(proposed(controller))
    step(7, 1, 6.0)
    assert not len(proposed(controller))
    for _ in range(1200):
        step(0, 1, 1.0)
    assert len(proposed(controller))
    step(7, 100, 1.0)
    step(7, 1, 3.0)
    assert len(proposed(controller))
