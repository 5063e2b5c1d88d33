"""SpeculationAllocation: the allocator's choices as candidates of a plan, with the bytes that the plan's lines give.

Speculation and resident layers are weighed in one currency, seconds a token. A pass that streams all weights takes
as long again as a pass of one token with resident weights (measured from the page cache); a layer's share of that is
its share of the weights.
"""

from __future__ import annotations

from dataclasses import replace

from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.lines import PlanLines
from lowtide.memory.plan.speculation.allocator import (
    MIN_SPEED_UP,
    SpeculationChoice,
    SpeculationPoint,
    best_within,
    lower_bound_bytes,
    operating_point,
)
from lowtide.memory.plan.speculation.choices import SpeculationConfig, SpeculationTable
from lowtide.models.spec import ModelSpec

STREAMING_SHARE = 1.0
"""Seconds that streaming all weights adds to a pass, as a share of a pass of one token with resident weights."""
ANY_BYTES = 1 << 62


class SpeculationAllocation:
    """What speculation may take in a plan."""

    def __init__(self, config: SpeculationConfig, lines: PlanLines, spec: ModelSpec) -> None:
        self._config = config
        self._lines = lines
        self._spec = spec

    def points(self, candidate: PlanCandidate) -> list[SpeculationPoint]:
        """Return all choices in a candidate, with the bytes that each adds to its plan."""
        without = self._total_bytes(candidate, self._config.least)
        extra_s = self._streaming_s(candidate)
        return [
            SpeculationPoint(
                choice=choice,
                num_bytes=max(self._total_bytes(candidate, choice) - without, 0),
                speed_up=self._config.worth.speed_up(choice, extra_s),
            )
            for choice in self._config.choices()
        ]

    def operating_points(self, candidate: PlanCandidate) -> tuple[SpeculationChoice, ...]:
        """Return the operating points of all budgets, from the smallest on.

        The first is what the request needs at least. Where nothing pays, drafts are watched, so that it is known when
        they do.
        """
        points = self.points(candidate)
        chosen = [self._config.least]
        for num_bytes in sorted({point.num_bytes for point in points}):
            point = operating_point(points, num_bytes)
            if point is not None and point.choice != chosen[-1]:
                chosen.append(point.choice)
        if len(chosen) == 1 and self._config.draft_model is None:
            chosen.append(self._config.watching)
        return tuple(chosen)

    def saves_more_than_layers(self, streamed: PlanCandidate) -> bool:
        """Whether a byte of speculation saves more seconds a token than a byte of resident weights."""
        point = operating_point(self.points(streamed), ANY_BYTES)
        if point is None:
            return False
        streaming_s = self._streaming_s(streamed)
        token_s = self._config.worth.costs.of(1) + streaming_s
        saved_s = token_s * (1 - 1 / point.speed_up)
        of_layers = streaming_s / max(self._spec.weight_bytes, 1)
        return saved_s / max(point.num_bytes, 1) >= of_layers

    def table(self, candidate: PlanCandidate) -> SpeculationTable:
        """Return the choices in a candidate of a plan, and which it has."""
        points, choice = self.points(candidate), candidate.speculation
        chosen = next((point for point in points if point.choice == choice), None)
        best = best_within(points, ANY_BYTES)
        if chosen is not None and best is not None and best.speed_up > 1:
            share = (
                f"{min(chosen.speed_up / best.speed_up, 1):.0%} of the best, {best.speed_up:.2f} x"
            )
            reason = f"{chosen.speed_up:.2f} x is promised: {share}"
        elif lower_bound_bytes(points) is None:
            most = best.speed_up if best else 1.0
            reason = f"the best choice promises {most:.2f} x, and less than {MIN_SPEED_UP:.2f} x is worth no memory"
        else:
            reason = "the budget leaves no room for it"
        return SpeculationTable(
            points=tuple(points), chosen=chosen, reason=reason, worth=self._config.worth
        )

    def _total_bytes(self, candidate: PlanCandidate, choice: SpeculationChoice) -> int:
        return self._lines.total_bytes(replace(candidate, speculation=choice))

    def _streaming_s(self, candidate: PlanCandidate) -> float:
        """Return the seconds that streamed weights add to a pass."""
        if candidate.resident_layers is None:
            return 0.0
        share = 1 - candidate.resident_layers / max(self._spec.num_layers, 1)
        return STREAMING_SHARE * share * self._config.worth.costs.of(1)
