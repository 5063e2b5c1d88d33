"""When the operating point changes between turns: against exhaustive search, and never to and fro."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lowtide.memory.plan.speculation.allocator import (
    ENOUGH_SHARE,
    MIN_SPEED_UP,
    SpeculationChoice,
    SpeculationPoint,
    operating_point,
)
from lowtide.memory.plan.speculation.replanning import ANY_BYTES, MARGIN, replanned


def some_points(source: random.Random) -> list[SpeculationPoint]:
    """Return choices of 2 to 8 tokens whose bytes grow with them, of any speeds."""
    most = source.uniform(0.9, 2.0)
    return [
        SpeculationPoint(
            choice=SpeculationChoice(drafts=("ngram",), verify_batch=rows, branches=branches),
            num_bytes=rows * 200_000 + branches * 50_000,
            speed_up=source.uniform(0.9, most),
        )
        for rows in range(2, 9)
        for branches in (False, True)
    ]


def wavering(
    points: Sequence[SpeculationPoint], source: random.Random, share: float
) -> list[SpeculationPoint]:
    return [
        replace(point, speed_up=point.speed_up * source.uniform(1 - share, 1 + share))
        for point in points
    ]


@pytest.mark.parametrize("seed", range(300))
def test_what_it_chooses_against_exhaustive_search(seed: int) -> None:
    source = random.Random(seed)
    points = some_points(source)
    best = max(point.speed_up for point in points)
    for current in (None, *points):
        chosen = replanned(points, current)
        if chosen is None:
            limit = MIN_SPEED_UP * (1 + MARGIN if current is None else 1 - MARGIN)
            assert best < limit
            continue
        assert chosen in points
        assert replanned(points, chosen) in (chosen, *_smaller(points, chosen))
        if current is None:
            assert chosen == operating_point(points, ANY_BYTES)
            continue
        stays_high = current.speed_up >= (ENOUGH_SHARE - MARGIN) * best
        clearly_enough = [
            point
            for point in _smaller(points, current)
            if point.speed_up >= (ENOUGH_SHARE + MARGIN) * best
        ]
        if not stays_high:
            expected = operating_point(points, ANY_BYTES) or current
        elif clearly_enough:
            expected = min(clearly_enough, key=lambda point: (point.num_bytes, -point.speed_up))
        else:
            expected = current
        assert chosen == expected
        # A change never takes more bytes without need, and never gives up more than the margin.
        assert chosen.num_bytes <= current.num_bytes or not stays_high
        if best >= MIN_SPEED_UP:
            assert chosen.speed_up >= (ENOUGH_SHARE - MARGIN) * best


@pytest.mark.parametrize("seed", range(100))
def test_acceptance_that_wavers_by_half_a_percent_never_goes_to_and_fro(seed: int) -> None:
    source = random.Random(seed)
    points = some_points(source)
    chosen = operating_point(points, ANY_BYTES)
    seen = [chosen]
    for _ in range(60):
        chosen = replanned(wavering(points, source, 0.005), chosen)
        if chosen is not None:
            chosen = next(point for point in points if point.choice == chosen.choice)
        if chosen != seen[-1]:
            seen.append(chosen)
    assert len(seen) == len(set(seen)), "a choice came back"


def _smaller(points: Sequence[SpeculationPoint], than: SpeculationPoint) -> list[SpeculationPoint]:
    return [point for point in points if point.num_bytes < than.num_bytes]
