"""Speculation in the plan: its lines, and that the allocator decides, against exhaustive search over whole plans."""

from __future__ import annotations

import dataclasses

import pytest
from promising_drafts import GOOD_RATES, speculation_of, worth_of

from lowtide.memory.budget import Budget
from lowtide.memory.plan.estimates import (
    FormulaSizes,
    kv_bytes,
    padded_context,
    shared_keys_bytes,
)
from lowtide.memory.plan.ladder import USUAL_CONTEXT
from lowtide.memory.plan.line import (
    DRAFT_CACHE,
    DRAFT_COMPUTE,
    DRAFT_WEIGHTS,
    SCRATCH,
    SPECULATION,
    PlanCandidate,
)
from lowtide.memory.plan.lines import PlanLines
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import BATCH_SIZES, plan_memory, require_fit
from lowtide.memory.plan.speculation.allocator import (
    ENOUGH_SHARE,
    MIN_SPEED_UP,
    NO_SPECULATION,
    DraftRates,
    Situation,
    SpeculationChoice,
)
from lowtide.memory.plan.speculation.candidates import SpeculationAllocation
from lowtide.memory.plan.speculation.choices import DraftTables, verification_bytes
from lowtide.memory.units import MIB, OverBudget
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec, VocabularySpec, WeightGroup, WeightSpan

BASELINE = ProcessBaseline(interpreter_bytes=46 * MIB, processor="x86_64")
SPEC = dataclasses.replace(
    fake_spec(512),
    vocabulary=VocabularySpec(num_tokens=50_000, num_merges=0, text_bytes=400_000),
)
CONFIG = speculation_of(DraftTables(name="ngram", table_bytes=100_000, token_bytes=9))


def plan_of(num_bytes: int, spec: ModelSpec = SPEC, **options: object) -> MemoryPlan:
    request = PlanRequest(**options)  # type: ignore[arg-type]
    return plan_memory(spec, request, Budget(num_bytes=num_bytes, source="a test"), BASELINE)


def lines_of(plan: MemoryPlan) -> dict[str, int]:
    return {line.component: line.num_bytes for line in plan.rows}


TREES = DraftRates(acceptance=(0.5, 0.9), siblings=0.9)
PLACES = (
    Situation(
        share=0.4,
        rates={"ngram": DraftRates(acceptance=(0.8,), siblings=0.4), "trigram": GOOD_RATES},
    ),
    Situation(share=0.3, rates={"trigram": DraftRates(acceptance=(0.7, 0.6))}),
)


def test_its_line_is_kv_slots_logits_and_tables() -> None:
    plan = plan_of(1 << 30, speculation=CONFIG)
    token_bytes = kv_bytes(SPEC, 256, "f16") // 256
    tables = 100_000 + 9 * plan.kv_tokens
    assert plan.verify_batch > 2 and plan.drafts == ("ngram",) and not plan.downgrades
    expected = verification_bytes(plan.verify_batch, token_bytes, 50_000) + tables
    assert lines_of(plan)[SPECULATION] == expected
    without = plan_of(1 << 30)
    assert without.verify_batch == 0 and SPECULATION not in lines_of(without)
    assert plan.total_bytes - without.total_bytes == lines_of(plan)[SPECULATION]


def test_native_attention_has_scratch_for_the_paths_of_branches() -> None:
    for threads in (0, 2):
        for branches in (False, True):
            config = speculation_of(branches=branches, worth=worth_of(("ngram",), TREES))
            without = plan_of(1 << 30, attention_threads=threads)
            plan = plan_of(1 << 30, attention_threads=threads, speculation=config)
            assert plan.branches == branches
            more = lines_of(plan)[SCRATCH] - lines_of(without)[SCRATCH]
            cells = padded_context(plan.context)
            paths = 4 * plan.verify_batch * cells
            paths += shared_keys_bytes(SPEC, cells, plan.verify_batch)
            assert more == paths * bool(branches and threads)


@pytest.mark.parametrize("branches", [False, True])
def test_at_every_budget_it_is_the_smallest_choice_at_96_percent_of_the_best_that_fits(
    branches: bool,
) -> None:
    """Against exhaustive search over whole plans: every choice, with the bytes of all lines."""
    config = speculation_of(
        DraftTables(name="ngram", table_bytes=90_000, token_bytes=8),
        DraftTables(name="trigram", table_bytes=500_000),
        branches=branches,
        worth=dataclasses.replace(worth_of(()), situations=PLACES),
    )
    request = PlanRequest(speculation=config, attention_threads=2)
    lines = PlanLines(SPEC, request, BASELINE, FormulaSizes(SPEC))
    whole = plan_of(1 << 30, speculation=config, attention_threads=2)
    least = whole.lower_bound_bytes
    seen = set()
    for budget in range(whole.total_bytes + MIB, least, -50_000):
        plan = plan_of(budget, speculation=config, attention_threads=2)
        assert plan.fits
        choice = SpeculationChoice(
            drafts=plan.drafts, verify_batch=plan.verify_batch, branches=plan.branches
        )
        seen.add(choice)
        candidate = PlanCandidate(
            context=plan.context,
            batch_size=BATCH_SIZES[0],
            kv_type=plan.kv_type,
            kv_tokens=plan.kv_tokens,
        )
        fitting = {
            one: lines.total_bytes(dataclasses.replace(candidate, speculation=one))
            for one in config.choices()
        }
        # Batches grow once speculation has what it takes of an unlimited budget.
        most = budget if plan.batch_size == BATCH_SIZES[0] else 1 << 40
        fitting = {one: size for one, size in fitting.items() if size <= most}
        speeds = {one: config.worth.speed_up(one) for one in fitting}
        best = max(speeds.values(), default=1.0)
        if best < MIN_SPEED_UP:
            assert not plan.verify_batch
            continue
        enough = max(ENOUGH_SHARE * best, MIN_SPEED_UP)
        assert speeds[choice] >= enough
        assert all(
            speed < enough or fitting[one] >= fitting[choice] for one, speed in speeds.items()
        )
    assert len(seen) > 3 and NO_SPECULATION in seen


def test_the_table_has_all_choices_and_what_more_would_bring() -> None:
    config = speculation_of(worth=worth_of(("ngram",), TREES), branches=True)
    plan = plan_of(1 << 30, speculation=config, attention_threads=2)
    values = plan.to_dict()["speculation"]
    assert len(values["choices"]) == 7 + 6  # 1 to 7 draft tokens, and trees from 2 on
    assert values["chosen"] in values["choices"]
    assert values["chosen"]["draft_tokens"] == plan.verify_batch - 1
    assert values["lower_bound_bytes"] <= values["chosen"]["bytes"]
    for more in values["more"]:
        assert more["bytes"] > 0 and more["speedup"] > values["chosen"]["speedup"]
    text = str(plan.speculation)
    assert text.count("<- chosen") == 1 and "pays from" in text
    without = plan_of(1 << 30)
    assert without.to_dict()["speculation"] is None


def test_where_nothing_pays_drafts_are_watched_and_nothing_is_verified() -> None:
    worth = worth_of(("ngram",), DraftRates(acceptance=(0.01,)))
    plan = plan_of(1 << 30, speculation=speculation_of(worth=worth))
    assert plan.verify_batch == 1 and plan.drafts == ("ngram",) and not plan.downgrades
    table = plan.speculation
    assert table is not None and table.chosen is None and "promises 1.0" in table.reason
    assert "no choice pays" in str(table)
    assert plan.to_dict()["speculation"]["lower_bound_bytes"] is None


def test_it_comes_before_a_context_beyond_the_usual_one_and_goes_before_the_usual_one() -> None:
    spec = dataclasses.replace(SPEC, context_length=16_384)
    whole = plan_of(1 << 32, spec, speculation=CONFIG)
    at_usual = plan_of(1 << 32, spec, context=USUAL_CONTEXT, speculation=CONFIG)
    assert whole.context == 16_384 and whole.verify_batch == at_usual.verify_batch
    between = plan_of(at_usual.total_bytes + MIB, spec, speculation=CONFIG)
    assert USUAL_CONTEXT <= between.context < 16_384
    assert between.verify_batch == whole.verify_batch
    below = plan_of(at_usual.total_bytes - 8 * MIB, spec, speculation=CONFIG)
    assert below.verify_batch < whole.verify_batch
    assert any(step.startswith("speculation: ") for step in below.downgrades)


def test_speculation_and_resident_layers_are_weighed_by_seconds_a_token_for_a_byte() -> None:
    """Large weights are worth less a byte than drafts that are often right, and small ones more."""
    streams = dataclasses.replace(BASELINE, kv_on_demand=True, can_stream_weights=True)
    first = []
    for layer_bytes in (64 * MIB, 40_000):
        groups = tuple(WeightGroup(i, (WeightSpan(0, 0, layer_bytes),)) for i in range(8))
        spec = dataclasses.replace(
            SPEC,
            num_layers=8,
            num_kv_heads=(1,) * 8,
            feed_forward_width=(64,) * 8,
            weight_groups=groups,
            weight_bytes=8 * layer_bytes,
        )
        request = PlanRequest(speculation=CONFIG)
        lines = PlanLines(spec, request, streams, FormulaSizes(spec))
        candidate = PlanCandidate(
            context=512, batch_size=32, kv_type="f16", kv_tokens=512, resident_layers=0
        )
        first.append(SpeculationAllocation(CONFIG, lines, spec).saves_more_than_layers(candidate))
    assert first == [True, False]


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
