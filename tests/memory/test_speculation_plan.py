"""The allocator against exhaustive search, with cost and acceptance curves of other devices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.plan.speculation import (
    ENOUGH_SHARE,
    MIN_SPEED_UP,
    CostCurve,
    DraftPromise,
    SpeculationPoint,
    best_within,
    expected_tokens,
    lower_bound_bytes,
    operating_point,
    points,
    speed_up,
    verification_bytes,
)

MEASURED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_ROWS = 64
TOKEN, VOCABULARY = 24_000, 49_152

DEVICES = {
    "GPU, bound by memory": lambda n: 0.012 * (1 + 0.004 * n),
    "GPU, tiles of 16 tokens": lambda n: 0.010 + 0.0015 * math.ceil(n / 16),
    "phone": lambda n: 0.08 * max(1.0, 0.55 + 0.22 * n),
    "laptop, bound by arithmetic": lambda n: 0.009 * (0.05 + 0.95 * n),
    "weights from a disk": lambda n: 0.9 + 0.011 * n,
    "matmul kernels for four tokens": lambda n: 0.004 * (0.6 + 0.35 * math.ceil(n / 4) + 0.05 * n),
}
DRAFTS = (
    DraftPromise(name="prompt lookup", acceptance=(0.6, 0.75, 0.8, 0.8), num_bytes=100_000),
    DraftPromise(name="table", acceptance=(0.45, 0.4, 0.3), num_bytes=460_000, token_s=2e-6),
    DraftPromise(
        name="model",
        acceptance=(0.82, 0.8, 0.77, 0.74, 0.7),
        num_bytes=130 << 20,
        fixed_s=1e-4,
        token_s=0.003,
    ),
)


def exhaustive(cost: object, budget_bytes: int) -> float:
    """Return the best throughput of any draft and any number of tokens inside the budget."""
    best = 1.0
    for draft in DRAFTS:
        for rows in range(2, MAX_ROWS + 1):
            num_bytes = draft.num_bytes + rows * TOKEN + (rows - 1) * 8 * VOCABULARY
            if num_bytes > budget_bytes:
                continue
            reached_share, tokens = 1.0, 1.0
            for position in range(rows - 1):
                reached_share *= draft.acceptance[min(position, len(draft.acceptance) - 1)]
                tokens += reached_share
            seconds = cost(rows) + draft.fixed_s + draft.token_s * (rows - 1)  # type: ignore[operator]
            best = max(best, tokens * cost(1) / seconds)  # type: ignore[operator]
    return best


def allocated(curve: CostCurve) -> list[SpeculationPoint]:
    return points(
        DRAFTS, curve, max_rows=MAX_ROWS, kv_token_bytes=TOKEN, vocabulary_size=VOCABULARY
    )


@pytest.mark.parametrize("device", DEVICES)
def test_within_one_percent_of_exhaustive_search_at_every_budget(device: str) -> None:
    cost = DEVICES[device]
    curve = CostCurve(num_rows=MEASURED, seconds=tuple(map(cost, MEASURED)))
    candidates = allocated(curve)
    by_name = {draft.name: draft for draft in DRAFTS}
    exact = CostCurve(
        num_rows=tuple(range(1, MAX_ROWS + 1)),
        seconds=tuple(map(cost, range(1, MAX_ROWS + 1))),
    )
    for budget in [*range(0, 30 << 20, 250_000), *range(130 << 20, 160 << 20, 1_000_000)]:
        chosen = best_within(candidates, budget)
        reached = 1.0
        if chosen is not None:
            assert chosen.num_bytes <= budget
            reached = speed_up(by_name[chosen.draft], exact, chosen.num_rows)
        assert reached >= 0.99 * exhaustive(cost, budget)
        point = operating_point(candidates, budget)
        if point is not None and chosen is not None:
            assert point.num_bytes <= chosen.num_bytes
            assert point.speed_up >= ENOUGH_SHARE * chosen.speed_up
        else:
            assert chosen is None or chosen.speed_up < MIN_SPEED_UP


def test_the_operating_point_saves_memory() -> None:
    cost = DEVICES["GPU, bound by memory"]
    candidates = allocated(CostCurve(num_rows=MEASURED, seconds=tuple(map(cost, MEASURED))))
    lookup = [point for point in candidates if point.draft == "prompt lookup"]
    chosen = operating_point(lookup, 1 << 30)
    best = best_within(lookup, 1 << 30)
    assert chosen is not None and best is not None
    assert chosen.num_bytes < 0.7 * best.num_bytes
    smaller = [point for point in lookup if point.num_bytes < chosen.num_bytes]
    assert all(point.speed_up < ENOUGH_SHARE * best.speed_up for point in smaller)


def test_the_lower_bound_is_the_first_budget_that_pays() -> None:
    cost = DEVICES["weights from a disk"]
    candidates = allocated(CostCurve(num_rows=MEASURED, seconds=tuple(map(cost, MEASURED))))
    bound = lower_bound_bytes(candidates)
    assert bound is not None
    assert operating_point(candidates, bound) is not None
    assert operating_point(candidates, bound - 1) is None


def test_where_nothing_pays_nothing_is_chosen() -> None:
    curve = CostCurve(num_rows=(1, 8), seconds=(0.01, 0.08))
    poor = points(
        [DraftPromise(name="poor", acceptance=(0.5,))],
        curve,
        max_rows=8,
        kv_token_bytes=TOKEN,
        vocabulary_size=VOCABULARY,
    )
    assert best_within(poor, 1 << 40) is None and operating_point(poor, 1 << 40) is None
    assert lower_bound_bytes(poor) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 12))
def test_more_drafts_never_mean_fewer_expected_tokens(
    acceptance: list[float], num_drafted: int
) -> None:
    fewer = expected_tokens(acceptance, num_drafted)
    more = expected_tokens(acceptance, num_drafted + 1)
    assert 1 <= fewer <= more <= num_drafted + 2


def test_a_plain_pass_takes_nothing_and_each_draft_its_logits_and_kv_slot() -> None:
    assert verification_bytes(1, TOKEN, VOCABULARY) == verification_bytes(0, TOKEN, VOCABULARY) == 0
    step = verification_bytes(6, TOKEN, VOCABULARY) - verification_bytes(5, TOKEN, VOCABULARY)
    assert step == TOKEN + 8 * VOCABULARY


def test_a_curve_is_linear_between_measured_points() -> None:
    curve = CostCurve(num_rows=(1, 2, 4), seconds=(1.0, 1.5, 3.5))
    assert [curve.of(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.5, 3.5, 5.5]
    assert CostCurve(num_rows=(1,), seconds=(2.0,)).of(3) == 6.0
