"""Whether another operating point is worth a change between turns, once more is known of how often drafts are right.

A change needs a margin in both directions, so that acceptance that wavers changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.memory.plan.speculation.allocator import (
    ENOUGH_SHARE,
    MIN_SPEED_UP,
    SpeculationPoint,
    operating_point,
)

MARGIN = 0.02
"""How far beyond a threshold a speed must be before it changes anything, as a share of the speed."""
ANY_BYTES = 1 << 62


def replanned(
    points: Sequence[SpeculationPoint], current: SpeculationPoint | None
) -> SpeculationPoint | None:
    """Return the point for the next turn; None where drafts are to be watched only.

    `points` have the speeds that are expected now, and `current` is the one in use, None where drafts are watched.
    The current one stays unless speculation no longer pays, it promises clearly less than `ENOUGH_SHARE` of the best,
    or a smaller one promises clearly more than that.
    """
    best = max((point.speed_up for point in points), default=1.0)
    now = next(
        (one for one in points if current is not None and one.choice == current.choice), None
    )
    if now is None:
        pays = best >= MIN_SPEED_UP * (1 + MARGIN)
        return operating_point(points, ANY_BYTES) if pays else None
    if best < MIN_SPEED_UP * (1 - MARGIN):
        return None
    if now.speed_up < (ENOUGH_SHARE - MARGIN) * best:
        return operating_point(points, ANY_BYTES) or now
    smaller = [
        point
        for point in points
        if point.num_bytes < now.num_bytes and point.speed_up >= (ENOUGH_SHARE + MARGIN) * best
    ]
    return min(smaller, key=lambda point: (point.num_bytes, -point.speed_up), default=now)
