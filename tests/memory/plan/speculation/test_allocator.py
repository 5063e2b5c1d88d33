"""The allocator against exhaustive search, with cost and acceptance curves of other devices."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.plan.speculation.allocator import (
    ENOUGH_SHARE,
    MIN_SPEED_UP,
    CostCurve,
    DraftRates,
    Situation,
    SpeculationChoice,
    SpeculationPoint,
    SpeculationWorth,
    best_within,
    frontier,
    lower_bound_bytes,
    operating_point,
)
from lowtide.memory.plan.speculation.choices import verification_bytes

MEASURED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TOKEN, VOCABULARY = 24_000, 49_152
DEVICES = {
    "GPU, bound by memory": lambda n: 0.012 * (1 + 0.004 * n),
    "GPU, tiles of 16 tokens": lambda n: 0.010 + 0.0015 * math.ceil(n / 16),
    "phone": lambda n: 0.08 * max(1.0, 0.55 + 0.22 * n),
    "laptop, bound by arithmetic": lambda n: 0.009 * (0.05 + 0.95 * n),
    "weights from a disk": lambda n: 0.9 + 0.011 * n,
    "matmul kernels for four tokens": lambda n: 0.004 * (0.6 + 0.35 * math.ceil(n / 4) + 0.05 * n),
}
LOOKUP = DraftRates(acceptance=(0.6, 0.75, 0.8, 0.8), siblings=0.3)
TABLE = DraftRates(acceptance=(0.45, 0.4, 0.3))
MODEL = DraftRates(acceptance=(0.82, 0.8, 0.77, 0.74, 0.7), token_s=0.003)
SITUATIONS = (
    Situation(share=0.3, rates={"lookup": LOOKUP, "table": TABLE}),
    Situation(share=0.2, rates={"table": TABLE}),
    Situation(share=0.1, rates={"lookup": DraftRates(acceptance=(0.2,))}),
)


def curve_of(device: str) -> CostCurve:
    cost = DEVICES[device]
    return CostCurve(num_rows=MEASURED, seconds=tuple(map(cost, MEASURED)))


def worth_of(costs: CostCurve, *situations: Situation) -> SpeculationWorth:
    return SpeculationWorth(
        costs=costs,
        situations=situations or SITUATIONS,
        costs_source="",
        acceptance_source="",
    )


def points_of(worth: SpeculationWorth) -> list[SpeculationPoint]:
    choices = [
        SpeculationChoice(drafts=drafts, verify_batch=rows, branches=branches)
        for drafts in (("lookup",), ("table",), ("lookup", "table"))
        for rows in range(2, 33)
        for branches in (False, True)
    ]
    return [
        SpeculationPoint(
            choice=choice,
            num_bytes=100_000 * len(choice.drafts)
            + verification_bytes(choice.verify_batch, TOKEN, VOCABULARY)
            + 4 * 8192 * choice.verify_batch * choice.branches,
            speed_up=worth.speed_up(choice),
        )
        for choice in choices
    ]


def best_pass(rates: DraftRates, costs: CostCurve, rows: int) -> float:
    """Return the highest speed of a pass with any number of drafts in a row, by trying them all."""
    best = 1.0
    for drafted in range(1, rows):
        reached, tokens = 1.0, 1.0
        for position in range(drafted):
            reached *= rates.acceptance[min(position, len(rates.acceptance) - 1)]
            tokens += reached
        seconds = costs.of(drafted + 1) + rates.token_s * drafted
        best = max(best, tokens * costs.of(1) / seconds)
    return best


@pytest.mark.parametrize("rates", [LOOKUP, TABLE, MODEL])
@pytest.mark.parametrize("device", DEVICES)
def test_the_gain_of_a_proposal_is_that_of_its_best_pass(device: str, rates: DraftRates) -> None:
    costs = curve_of(device)
    for rows in (1, 2, 5, 32):
        expected = best_pass(rates, costs, rows)
        assert rates.gain(costs, rows, branches=False) == pytest.approx(expected)
        assert rates.gain(costs, rows, branches=True) >= expected - 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_the_operating_point_is_the_smallest_at_96_percent_of_the_best(device: str) -> None:
    points = points_of(worth_of(curve_of(device)))
    found = []
    for budget in range(0, 16 << 20, 250_000):
        fitting = [point for point in points if point.num_bytes <= budget]
        best = max((point.speed_up for point in fitting), default=1.0)
        point = operating_point(points, budget)
        if best < MIN_SPEED_UP:
            assert point is None
            continue
        assert point is not None and point in fitting
        assert point.speed_up >= max(ENOUGH_SHARE * best, MIN_SPEED_UP)
        smaller = [one for one in fitting if one.num_bytes < point.num_bytes]
        assert all(
            one.speed_up < ENOUGH_SHARE * best or one.speed_up < MIN_SPEED_UP for one in smaller
        )
        found.append(point)
    for small, large in pairwise(found):
        assert large.num_bytes >= small.num_bytes and large.speed_up >= small.speed_up


def test_the_operating_point_saves_memory() -> None:
    points = points_of(worth_of(curve_of("GPU, bound by memory")))
    chosen, best = operating_point(points, 1 << 30), best_within(points, 1 << 30)
    assert chosen is not None and best is not None
    assert chosen.num_bytes < 0.7 * best.num_bytes


def test_the_lower_bound_is_the_first_budget_that_pays() -> None:
    points = points_of(worth_of(curve_of("weights from a disk")))
    bound = lower_bound_bytes(points)
    assert bound is not None
    assert operating_point(points, bound) is not None
    assert operating_point(points, bound - 1) is None


def test_where_nothing_pays_nothing_is_chosen() -> None:
    dear = CostCurve(num_rows=(1, 8), seconds=(0.01, 0.08))
    poor = points_of(worth_of(dear, Situation(share=1.0, rates={"lookup": TABLE})))
    assert all(point.speed_up == 1 for point in poor)
    assert best_within(poor, 1 << 40) is None and operating_point(poor, 1 << 40) is None
    assert lower_bound_bytes(poor) is None


def test_a_text_is_as_fast_as_its_places_by_their_share() -> None:
    """Half of the tokens at twice the speed and half at the plain one: 1 / (0.5 / 2 + 0.5) of the time."""
    free = CostCurve(num_rows=(1, 2), seconds=(1.0, 1.0))
    always = Situation(share=0.5, rates={"lookup": DraftRates(acceptance=(1.0,))})
    choice = SpeculationChoice(drafts=("lookup",), verify_batch=2)
    assert worth_of(free, always).speed_up(choice) == pytest.approx(1 / 0.75)
    # Where every pass takes as long again, a token costs next to nothing.
    costs = CostCurve(num_rows=(1, 2), seconds=(1.0, 2.0))
    assert worth_of(costs, always).speed_up(choice) == 1
    assert worth_of(costs, always).speed_up(choice, extra_s=1e9) == pytest.approx(1 / 0.75)


def test_the_frontier_has_no_point_that_a_smaller_one_beats() -> None:
    points = points_of(worth_of(curve_of("phone")))
    found = frontier(points)
    for small, large in pairwise(found):
        assert small.num_bytes < large.num_bytes and small.speed_up < large.speed_up
    for point in points:
        assert any(
            one.num_bytes <= point.num_bytes and one.speed_up >= point.speed_up for one in found
        )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 12))
def test_more_drafts_and_branches_never_promise_less(
    acceptance: list[float], siblings: float, num_rows: int
) -> None:
    costs = curve_of("phone")
    rates = DraftRates(acceptance=tuple(acceptance), siblings=siblings)
    fewer = rates.gain(costs, num_rows, branches=False)
    assert 1 <= fewer <= rates.gain(costs, num_rows + 1, branches=False) + 1e-9
    assert fewer <= rates.gain(costs, num_rows, branches=True) + 1e-9


def test_a_plain_pass_takes_nothing_and_each_draft_its_logits_and_kv_slot() -> None:
    assert verification_bytes(1, TOKEN, VOCABULARY) == verification_bytes(0, TOKEN, VOCABULARY) == 0
    step = verification_bytes(6, TOKEN, VOCABULARY) - verification_bytes(5, TOKEN, VOCABULARY)
    assert step == TOKEN + 8 * VOCABULARY


def test_a_curve_is_linear_between_measured_points() -> None:
    curve = CostCurve(num_rows=(1, 2, 4), seconds=(1.0, 1.5, 3.5))
    assert [curve.of(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.5, 3.5, 5.5]
    assert CostCurve(num_rows=(1,), seconds=(2.0,)).of(3) == 6.0
    assert curve.plus(1.0).of(3) == 3.5
