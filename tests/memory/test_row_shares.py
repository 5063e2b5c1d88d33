"""How a pass is shared out among sequences, against every other way to share it out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.plan.batch import share_rows
from lowtide.memory.plan.speculation import CostCurve, expected_tokens

CHEAP = CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1))
TILES = CostCurve(num_rows=(1, 4, 5, 8, 9, 12), seconds=(1.0, 1.1, 1.5, 1.6, 2.4, 2.5))
DEAR = CostCurve(num_rows=(1, 8), seconds=(1.0, 8.0))

acceptance = st.lists(st.floats(0.01, 1.0), max_size=4)


def promised(
    acceptances: Sequence[Sequence[float]], drafted: Sequence[int], cost: CostCurve
) -> float:
    """The throughput with so many drafts of each, as a multiple of that without."""
    num = len(acceptances)
    tokens = sum(expected_tokens(a, n) for a, n in zip(acceptances, drafted, strict=True))
    return tokens / num * cost.of(num) / cost.of(num + sum(drafted))


@given(
    acceptances=st.lists(acceptance, min_size=1, max_size=3),
    cost=st.sampled_from([CHEAP, TILES, DEAR]),
    more_rows=st.integers(0, 9),
)
def test_no_other_shares_promise_more(
    acceptances: list[list[float]], cost: CostCurve, more_rows: int
) -> None:
    num = len(acceptances)
    found = share_rows(acceptances, cost.of, most_rows=num + more_rows, least_gain=1.0)
    others = [
        drafted
        for drafted in itertools.product(*(range(len(a) + 1) for a in acceptances))
        if 0 < sum(drafted) <= more_rows
    ]
    best = max((promised(acceptances, drafted, cost) for drafted in others), default=None)
    assert (found.gain is None) == (best is None)
    if best is None or best <= 1.0:
        assert not any(found.num_drafted)
    if best is not None:
        assert found.gain == pytest.approx(best)
    if any(found.num_drafted):
        assert found.num_drafted in others
        assert promised(acceptances, found.num_drafted, cost) == pytest.approx(best)


def test_the_next_row_goes_to_the_likeliest_token() -> None:
    acceptances = [(0.9, 0.5, 0.9), (0.8, 0.9), (), (0.1,)]
    drafted = [
        share_rows(acceptances, lambda _: 1.0, most_rows=4 + more, least_gain=1.0).num_drafted
        for more in range(7)
    ]
    assert drafted == [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 2, 0, 0),
        (2, 2, 0, 0),
        (3, 2, 0, 0),
        (3, 2, 0, 1),
    ]


def test_what_promises_too_little_is_told_and_not_drafted() -> None:
    shares = share_rows([(0.5,), ()], CHEAP.of, most_rows=8, least_gain=1.3)
    assert shares.num_drafted == (0, 0)
    assert shares.gain == pytest.approx(1.25 * CHEAP.of(2) / CHEAP.of(3))
    dear = share_rows([(0.99,) * 6] * 2, DEAR.of, most_rows=8, least_gain=1.08)
    assert dear.num_drafted == (0, 0) and dear.gain is not None and dear.gain < 1


def test_where_nothing_is_proposed_or_no_row_is_left_there_is_nothing_to_gain() -> None:
    for acceptances, most_rows in (([(), ()], 8), ([(0.9,), (0.9,)], 2)):
        shares = share_rows(acceptances, CHEAP.of, most_rows=most_rows, least_gain=1.0)
        assert shares.num_drafted == (0, 0) and shares.gain is None
