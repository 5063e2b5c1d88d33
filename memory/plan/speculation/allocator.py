"""What speculation takes and gives, by arithmetic alone: the model of SpecMemo and its allocator.

A reconstruction, as the paper's own formulas were not at hand. Two measurements go in: the seconds of a pass by its
tokens, and how often drafts are right, by position and by how sure they are. A choice is which drafts run, how many
tokens a pass verifies, and whether drafts may branch. The operating point is the least memory that reaches 96 % of
the best speed that fits. The lower bound is the least memory at which any choice pays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

MIN_SPEED_UP = 1.05
"""The least speed-up that is worth any memory."""
ENOUGH_SHARE = 0.96
"""Share of the best throughput that the operating point must reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Seconds of a pass by its tokens, measured at a few numbers of them, ascending from 1."""

    num_rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, num_rows: int) -> float:
        """Return the seconds of a pass, linear between and beyond the measured points."""
        rows, seconds = self.num_rows, self.seconds
        if len(rows) == 1:
            return seconds[0] * num_rows / rows[0]
        right = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (rows[right] - rows[left])
        return max(seconds[left] + slope * (num_rows - rows[left]), 0.0)

    def plus(self, seconds: float) -> CostCurve:
        """Return the curve of passes that take `seconds` more, whatever their tokens."""
        return CostCurve(
            num_rows=self.num_rows, seconds=tuple(one + seconds for one in self.seconds)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRates:
    """What one proposal is worth.

    `acceptance` is the acceptance rate by position where all drafts before it were right; the last rate holds for
    later positions, too. `siblings` is the rate of an alternative where the token beside it was wrong. Drafting
    takes `token_s` seconds a token.
    """

    acceptance: tuple[float, ...]
    siblings: float = 0.0
    token_s: float = 0.0

    def gain(self, cost: CostCurve, num_rows: int, *, branches: bool) -> float:
        """Return the speed of the best pass of at most `num_rows` tokens, in multiples of a pass of one."""
        chances = self._chances(num_rows - 1, branches=branches)
        plain_s, expected, best = cost.of(1), 1.0, 1.0
        for num_drafted, chance in enumerate(chances, start=1):
            expected += chance
            seconds = cost.of(num_drafted + 1) + self.token_s * num_drafted
            best = max(best, expected * plain_s / max(seconds, 1e-12))
        return best

    def _chances(self, num_drafted: int, *, branches: bool) -> list[float]:
        """Return the chances of the drafts that are accepted most often, in descending order."""
        if num_drafted < 1 or not self.acceptance:
            return []
        rates = [
            self.acceptance[min(position, len(self.acceptance) - 1)]
            for position in range(num_drafted)
        ]
        trunk = list(accumulate(rates, mul))
        beside = [
            (before - reached) * self.siblings
            for before, reached in zip([1.0, *trunk], trunk, strict=False)
        ]
        return sorted(trunk + beside * branches, reverse=True)[:num_drafted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A kind of place in a text: the share of all tokens that lie at one, and what each draft proposes there."""

    share: float
    rates: Mapping[str, DraftRates]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationChoice:
    """Which drafts propose, how many tokens a pass verifies, and whether drafts may branch."""

    drafts: tuple[str, ...]
    verify_batch: int
    branches: bool = False

    @property
    def name(self) -> str:
        """The drafts as `--speculate` names them."""
        return self.drafts[0] if len(self.drafts) == 1 else "auto"


NO_SPECULATION = SpeculationChoice(drafts=(), verify_batch=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationWorth:
    """What the allocator knows: the cost of passes, the places in texts, and in words where both come from."""

    costs: CostCurve
    situations: tuple[Situation, ...]
    costs_source: str
    acceptance_source: str

    def speed_up(self, choice: SpeculationChoice, extra_s: float = 0.0) -> float:
        """Return the expected speed, relative to none drafted, where every pass takes `extra_s` seconds more.

        A token at a place where drafts gain g takes 1 / g of its time, so the gains of places have a harmonic mean.
        """
        costs = self.costs.plus(extra_s) if extra_s else self.costs
        plain = 1.0 - sum(situation.share for situation in self.situations)
        seconds = max(plain, 0.0)
        for situation in self.situations:
            gains = (
                rates.gain(costs, choice.verify_batch, branches=choice.branches)
                for draft, rates in situation.rates.items()
                if draft in choice.drafts
            )
            seconds += situation.share / max(gains, default=1.0)
        return 1.0 / max(seconds, 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPoint:
    """A choice with its bytes and its expected speed, relative to none drafted."""

    choice: SpeculationChoice
    num_bytes: int
    speed_up: float

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "draft": self.choice.name,
            "draft_tokens": self.choice.verify_batch - 1,
            "branches": self.choice.branches,
            "bytes": self.num_bytes,
            "speedup": self.speed_up,
        }


def best_within(
    candidates: Iterable[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the fastest point that fits and is faster than none, of equals the smallest; None for none."""
    fitting = [point for point in candidates if point.num_bytes <= budget_bytes]
    faster = [point for point in fitting if point.speed_up > 1]
    return max(faster, key=lambda point: (point.speed_up, -point.num_bytes), default=None)


def operating_point(
    candidates: Sequence[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the smallest point that reaches `ENOUGH_SHARE` of the best that fits; None where none pays.

    With a larger budget it never takes fewer bytes, and never promises less.
    """
    best = best_within(candidates, budget_bytes)
    if best is None or best.speed_up < MIN_SPEED_UP:
        return None
    enough = [
        point
        for point in candidates
        if point.num_bytes <= budget_bytes
        and point.speed_up >= max(ENOUGH_SHARE * best.speed_up, MIN_SPEED_UP)
    ]
    return min(enough, key=lambda point: (point.num_bytes, -point.speed_up))


def lower_bound_bytes(candidates: Iterable[SpeculationPoint]) -> int | None:
    """Return the least memory at which speculation reaches `MIN_SPEED_UP`; None where it never does."""
    worth = (point.num_bytes for point in candidates if point.speed_up >= MIN_SPEED_UP)
    return min(worth, default=None)


def frontier(candidates: Iterable[SpeculationPoint]) -> tuple[SpeculationPoint, ...]:
    """Return the points that no smaller or equal one is as fast as, from the smallest on."""
    found: list[SpeculationPoint] = []
    for point in sorted(candidates, key=lambda point: (point.num_bytes, -point.speed_up)):
        if not found or point.speed_up > found[-1].speed_up:
            found.append(point)
    return tuple(found)
