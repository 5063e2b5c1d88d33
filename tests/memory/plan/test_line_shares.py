"""How the tokens of a pass are shared among drafts, against every other way to share them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.plan.batch import RowShares, share_rows
from lowtide.memory.plan.speculation.allocator import CostCurve

CHEAP = CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1))
TILES = CostCurve(num_rows=(1, 4, 5, 8, 9, 12), seconds=(1.0, 1.1, 1.5, 1.6, 2.4, 2.5))
DEAR = CostCurve(num_rows=(1, 8), seconds=(1.0, 8.0))

acceptance = st.lists(st.floats(0.01, 1.0), max_size=4)


def share(
    acceptances: Sequence[Sequence[float]],
    cost: Callable[[int], float],
    max_rows: int,
    min_gain: float = 1.0,
    token_s: float = 0.0,
) -> RowShares:
    """Share a pass among chains of drafts with these acceptance rates."""
    return share_rows(
        [tuple(itertools.accumulate(rates, operator.mul)) for rates in acceptances],
        cost,
        max_rows=max_rows,
        min_gain=min_gain,
        seconds=[(token_s,) * len(rates) for rates in acceptances],
    )


def promised(
    acceptances: Sequence[Sequence[float]],
    drafted: Sequence[int],
    cost: CostCurve,
    token_s: float = 0.0,
) -> float:
    """Return the throughput with these drafts, in multiples of a pass without drafts."""
    num = len(acceptances)
    tokens = sum(
        sum(itertools.accumulate((1.0, *a[:n]), operator.mul))
        for a, n in zip(acceptances, drafted, strict=True)
    )
    seconds = cost.of(num + sum(drafted)) + token_s * sum(drafted)
    return tokens / num * cost.of(num) / seconds


@given(
    acceptances=st.lists(acceptance, min_size=1, max_size=3),
    cost=st.sampled_from([CHEAP, TILES, DEAR]),
    more_rows=st.integers(0, 9),
    token_s=st.sampled_from([0.0, 0.05]),
)
def test_no_other_shares_promise_more(
    acceptances: list[list[float]], cost: CostCurve, more_rows: int, token_s: float
) -> None:
    num = len(acceptances)
    found = share(acceptances, cost.of, num + more_rows, token_s=token_s)
    others = [
        drafted
        for drafted in itertools.product(*(range(len(a) + 1) for a in acceptances))
        if 0 < sum(drafted) <= more_rows
    ]
    gains = [promised(acceptances, drafted, cost, token_s) for drafted in others]
    best = max(gains, default=None)
    assert (found.gain is None) == (best is None)
    if best is None or best <= 1.0:
        assert not any(found.num_drafted)
    if best is not None:
        assert found.gain == pytest.approx(best)
    if any(found.num_drafted):
        assert found.num_drafted in others
        assert promised(acceptances, found.num_drafted, cost, token_s) == pytest.approx(best)


def test_the_next_token_of_a_pass_goes_to_the_most_probable_draft() -> None:
    acceptances = [(0.9, 0.5, 0.9), (0.8, 0.9), (), (0.1,)]
    drafted = [share(acceptances, lambda _: 1.0, 4 + more).num_drafted for more in range(7)]
    assert drafted == [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 2, 0, 0),
        (2, 2, 0, 0),
        (3, 2, 0, 0),
        (3, 2, 0, 1),
    ]


def test_a_gain_that_is_too_small_is_reported_and_nothing_drafted() -> None:
    shares = share([(0.5,), ()], CHEAP.of, 8, min_gain=1.3)
    assert shares.num_drafted == (0, 0)
    assert shares.gain == pytest.approx(1.25 * CHEAP.of(2) / CHEAP.of(3))
    dear = share([(0.99,) * 6] * 2, DEAR.of, 8, min_gain=1.08)
    assert dear.num_drafted == (0, 0) and dear.gain is not None and dear.gain < 1


def test_without_proposals_or_room_there_is_nothing_to_gain() -> None:
    for acceptances, max_rows in (([(), ()], 8), ([(0.9,), (0.9,)], 2)):
        shares = share(acceptances, CHEAP.of, max_rows)
        assert shares.num_drafted == (0, 0) and shares.gain is None
