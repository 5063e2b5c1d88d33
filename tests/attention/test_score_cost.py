"""ScoreCost: the shares of multiplications that were skipped."""

from __future__ import annotations

from lowtide.attention.bindings.counts import NO_COST, ScoreCost

BEFORE = ScoreCost(1000, 600, 300, 750, 2000, 1600)
AFTER = ScoreCost(3000, 1600, 500, 1700, 6000, 3900)


def test_the_cost_between_two_counts() -> None:
    cost = AFTER - BEFORE
    assert cost == ScoreCost(2000, 1000, 200, 950, 4000, 2300)
    assert cost.sparsity == 0.8 and cost.skipped == 0.525
    assert cost.to_dict() == {
        "sparsity": 0.8,
        "skipped": 0.525,
        "key_bytes_total": 4000,
        "key_bytes_read": 2300,
    }
    assert str(cost) == "52% of the score multiplications skipped (80% behind the window)"


def test_without_scores_nothing_is_skipped() -> None:
    assert NO_COST.sparsity == NO_COST.skipped == 0
