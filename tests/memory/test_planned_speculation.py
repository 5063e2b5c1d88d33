"""Speculation in the plan: its lines, and that it is downgraded before anything else."""

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
    vocabulary=VocabularySpec(num_tokens=50_000, num_merges=0, text_bytes=400_000),
)
CONFIG = SpeculationConfig(verify_batch=8, table_bytes=100_000, token_bytes=9)


def plan_of(num_bytes: int, spec: ModelSpec = SPEC, **options: object) -> MemoryPlan:
    request = PlanRequest(**options)  # type: ignore[arg-type]
    return plan_memory(spec, request, Budget(num_bytes=num_bytes, source="a test"), BASELINE)


def lines_of(plan: MemoryPlan) -> dict[str, int]:
    return {line.component: line.num_bytes for line in plan.rows}


def test_its_line_is_kv_slots_logits_and_tables() -> None:
    plan = plan_of(1 << 30, speculation=CONFIG)
    token_bytes = kv_bytes(SPEC, 256, "f16") // 256
    tables = 100_000 + 9 * plan.kv_tokens
    assert plan.verify_batch == 8 and not plan.downgrades
    assert lines_of(plan)[SPECULATION] == verification_bytes(8, token_bytes, 50_000) + tables
    without = plan_of(1 << 30)
    assert without.verify_batch == 0 and SPECULATION not in lines_of(without)
    assert plan.total_bytes - without.total_bytes == lines_of(plan)[SPECULATION]


def test_native_attention_has_scratch_for_the_paths_of_branches() -> None:
    for threads, path_bytes in ((0, 0), (2, 4 * 8)):
        without = plan_of(1 << 30, attention_threads=threads)
        plan = plan_of(1 << 30, attention_threads=threads, speculation=CONFIG)
        more = lines_of(plan)[SCRATCH] - lines_of(without)[SCRATCH]
        assert more == path_bytes * padded_context(plan.context)


def test_draft_tokens_are_dropped_by_halves_before_anything_else() -> None:
    whole = plan_of(1 << 30, speculation=CONFIG, prefix_bytes=MIB)
    rest = whole.total_bytes - lines_of(whole)[SPECULATION]
    seen = []
    for budget in range(int(whole.total_bytes * 1.2), rest - MIB, -100_000):
        plan = plan_of(budget, speculation=CONFIG, prefix_bytes=MIB)
        seen.append(plan.verify_batch)
        if plan.verify_batch:
            assert lines_of(plan)[PREFIXES] == MIB
            assert (plan.context, plan.batch_size) == (whole.context, whole.batch_size)
        if plan.verify_batch < 8:
            assert plan.downgrades[0].startswith("speculation: 8 tokens per verification to ")
        assert plan.fits
    assert list(dict.fromkeys(seen)) == [8, 4, 2, 0]


def test_speculation_does_not_raise_the_lower_bound() -> None:
    bound = plan_of(1 << 30).lower_bound_bytes
    assert plan_of(1 << 30, speculation=CONFIG).lower_bound_bytes == bound
    assert plan_of(bound, speculation=CONFIG).fits


def test_a_draft_model_is_part_of_the_request() -> None:
    draft = dataclasses.replace(SPEC, weight_bytes=30 * MIB, name="small")
    config = dataclasses.replace(CONFIG, draft_model=draft)
    plan = plan_of(1 << 30, speculation=config)
    lines = lines_of(plan)
    assert lines[DRAFT_WEIGHTS] >= 30 * MIB and lines[DRAFT_CACHE] and lines[DRAFT_COMPUTE]
    without = plan_of(1 << 30, speculation=CONFIG)
    assert plan.lower_bound_bytes >= without.lower_bound_bytes + 30 * MIB
    tight = plan_of(without.lower_bound_bytes + MIB, speculation=config)
    assert not tight.fits
    with pytest.raises(OverBudget, match="raise memory"):
        require_fit(tight, SPEC, PlanRequest(speculation=config), BASELINE)
