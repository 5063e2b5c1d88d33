"""What an allocator knows of speculation, made up for tests: costs of passes, and drafts that are often right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from lowtide.memory.plan.speculation.allocator import (
    CostCurve,
    DraftRates,
    Situation,
    SpeculationPoint,
    SpeculationWorth,
)
from lowtide.memory.plan.speculation.choices import DraftTables, SpeculationConfig
from lowtide.models.spec import ModelSpec

CHEAP_PASSES = CostCurve(num_rows=(1, 32), seconds=(0.01, 0.0131))
GOOD_RATES = DraftRates(acceptance=(0.8,), siblings=0.2)


def worth_of(
    drafts: tuple[str, ...], rates: DraftRates = GOOD_RATES, costs: CostCurve = CHEAP_PASSES
) -> SpeculationWorth:
    """Return the worth of drafts that all propose at every second token."""
    situation = Situation(share=0.5, rates=dict.fromkeys(drafts, rates))
    return SpeculationWorth(
        costs=costs, situations=(situation,), costs_source="made up", acceptance_source="made up"
    )


def speculation_of(
    *drafts: DraftTables,
    verify_batch: int = 8,
    draft_model: ModelSpec | None = None,
    branches: bool = False,
    worth: SpeculationWorth | None = None,
) -> SpeculationConfig:
    """Return what a plan must know of these drafts; without any, of one that takes no memory."""
    drafts = drafts or (DraftTables(name="ngram"),)
    return SpeculationConfig(
        verify_batch=verify_batch,
        worth=worth or worth_of(tuple(draft.name for draft in drafts)),
        drafts=drafts,
        draft_model=draft_model,
        branches=branches,
    )


def largest_point(
    candidates: Sequence[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the point that verifies the most, whatever it is worth."""
    fitting = [point for point in candidates if point.num_bytes <= budget_bytes]
    return max(
        fitting,
        key=lambda point: (
            point.choice.verify_batch,
            point.choice.branches,
            len(point.choice.drafts),
        ),
        default=None,
    )


@contextmanager
def largest_speculation() -> Iterator[None]:
    """Have plans verify as much as the user allows: for tests of what is done with it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("speculation.candidates", "planner"):
            patch.setattr(f"lowtide.memory.plan.{module}.operating_point", largest_point)
        yield
