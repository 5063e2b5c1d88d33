"""Speculation in the plan: its rows, and that it is what is given up first."""

from __future__ import annotations

import dataclasses

import pytest

from lowtide.memory.budget import Budget
from lowtide.memory.plan.estimates import kv_bytes, padded_context
from lowtide.memory.plan.line import (
    DRAFT_CACHE,
    DRAFT_COMPUTE,
    DRAFT_WEIGHTS,
    PREFIXES,
    SCRATCH,
    SPECULATION,
)
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import plan_memory, require_fit
from lowtide.memory.plan.speculation import SpeculationConfig, verification_bytes
from lowtide.memory.units import MIB, OverBudget
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec, VocabularySpec

BASELINE = ProcessBaseline(interpreter_bytes=46 * MIB, processor="x86_64")
SPEC = dataclasses.replace(
    fake_spec(512),
    vocabulary=VocabularySpec(
        num_tokens=50_000, num_merges=0, text_bytes=400_000, longest_token_bytes=9
    ),
)
WISH = SpeculationConfig(num_rows=8, table_bytes=100_000, token_bytes=9)


def plan_of(num_bytes: int, spec: ModelSpec = SPEC, **options: object) -> MemoryPlan:
    chosen = PlanRequest(**options)  # type: ignore[arg-type]
    return plan_memory(spec, chosen, Budget(num_bytes=num_bytes, source="a test"), BASELINE)


def rows_of(plan: MemoryPlan) -> dict[str, int]:
    return {row.component: row.num_bytes for row in plan.rows}


def test_its_row_is_cells_logits_and_tables() -> None:
    plan = plan_of(1 << 30, speculation=WISH)
    cell_bytes = kv_bytes(SPEC, 256, "f16") // 256
    tables = 100_000 + 9 * plan.kv_tokens
    assert plan.verify_batch == 8 and not plan.downgrades
    assert rows_of(plan)[SPECULATION] == verification_bytes(8, cell_bytes, 50_000) + tables
    without = plan_of(1 << 30)
    assert without.verify_batch == 0 and SPECULATION not in rows_of(without)
    assert plan.total_bytes - without.total_bytes == rows_of(plan)[SPECULATION]


def test_our_attention_has_room_for_the_paths_of_branches() -> None:
    for threads, path_bytes in ((0, 0), (2, 4 * 8)):
        without = plan_of(1 << 30, attention_threads=threads)
        plan = plan_of(1 << 30, attention_threads=threads, speculation=WISH)
        more = rows_of(plan)[SCRATCH] - rows_of(without)[SCRATCH]
        assert more == path_bytes * padded_context(plan.context)


def test_rows_are_given_up_one_after_the_other_before_anything_else() -> None:
    whole = plan_of(1 << 30, speculation=WISH, prefix_bytes=MIB)
    rest = whole.total_bytes - rows_of(whole)[SPECULATION]
    seen = []
    for budget in range(int(whole.total_bytes * 1.2), rest - MIB, -100_000):
        plan = plan_of(budget, speculation=WISH, prefix_bytes=MIB)
        seen.append(plan.verify_batch)
        if plan.verify_batch:
            assert rows_of(plan)[PREFIXES] == MIB
            assert (plan.context, plan.batch_size) == (whole.context, whole.batch_size)
        if plan.verify_batch < 8:
            assert plan.downgrades[0].startswith("speculation: 8 tokens per verification to ")
        assert plan.fits
    assert list(dict.fromkeys(seen)) == [8, 4, 2, 0]


def test_what_runs_without_it_runs_with_it() -> None:
    bound = plan_of(1 << 30).lower_bound_bytes
    assert plan_of(1 << 30, speculation=WISH).lower_bound_bytes == bound
    assert plan_of(bound, speculation=WISH).fits


def test_a_draft_model_is_part_of_the_request() -> None:
    draft = dataclasses.replace(SPEC, weight_bytes=30 * MIB, name="small")
    wish = dataclasses.replace(WISH, draft_model=draft)
    plan = plan_of(1 << 30, speculation=wish)
    rows = rows_of(plan)
    assert rows[DRAFT_WEIGHTS] >= 30 * MIB and rows[DRAFT_CACHE] and rows[DRAFT_COMPUTE]
    without = plan_of(1 << 30, speculation=WISH)
    assert plan.lower_bound_bytes >= without.lower_bound_bytes + 30 * MIB
    tight = plan_of(without.lower_bound_bytes + MIB, speculation=wish)
    assert not tight.fits
    with pytest.raises(OverBudget, match="raise --memory"):
        require_fit(tight, SPEC, PlanRequest(speculation=wish), BASELINE)
