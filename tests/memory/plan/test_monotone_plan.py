"""More memory never takes anything away from a plan, and what is known of the prompt comes first."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promising_drafts import speculation_of, worth_of

from lowtide.memory.budget import Budget
from lowtide.memory.plan import estimates
from lowtide.memory.plan.attention import AttentionMemory, FilterPrefill
from lowtide.memory.plan.ladder import MIN_CONTEXT, USUAL_CONTEXT
from lowtide.memory.plan.line import PREFIXES, SCRATCH, SPECULATION, WEIGHTS
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import plan_memory
from lowtide.memory.plan.speculation.allocator import ENOUGH_SHARE, DraftRates
from lowtide.memory.plan.speculation.choices import DraftTables, SpeculationConfig
from lowtide.memory.units import GIB, MIB
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec, VocabularySpec, WeightGroup, WeightSpan

BETTER_TYPES = ("q4_0", "q8_0", "f16", "f32")
KV_TYPES = [("f16", "q8_0", "q4_0"), ("f16", "f32"), ("f32",), ("f16",)]
"""Those of llama.cpp, of rewritten ONNX graphs, and of graphs that run as they are."""


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers = draw(st.integers(1, 40))
    head_dim = draw(st.sampled_from([48, 64, 80, 128, 256]))
    layer_bytes = [draw(st.integers(1, 1 << draw(st.integers(10, 28)))) for _ in range(layers)]
    outside = [draw(st.integers(1, 1 << 28)) for _ in range(draw(st.integers(0, 3)))]
    in_layers = [WeightGroup(i, (WeightSpan(0, 0, n),)) for i, n in enumerate(layer_bytes)]
    others = [WeightGroup(None, (WeightSpan(0, 0, n),), "t") for n in outside]
    weight_bytes = sum(layer_bytes) + sum(outside)
    is_onnx = draw(st.booleans())
    return dataclasses.replace(
        fake_spec(draw(st.sampled_from([1, 255, 512, 1000, 4097, 8192, 131_072, 1 << 31]))),
        num_layers=layers,
        embedding_width=draw(st.integers(32, 4096)),
        feed_forward_width=tuple(draw(st.integers(0, 16_384)) for _ in range(layers)),
        num_heads=draw(st.integers(1, 64)),
        num_kv_heads=tuple(draw(st.integers(0, 8)) for _ in range(layers)),
        key_head_dim=head_dim,
        value_head_dim=draw(st.sampled_from([head_dim, 64])),
        weight_bytes=weight_bytes,
        file_bytes=weight_bytes + draw(st.integers(0, 1 << 22)),
        weight_groups=() if is_onnx else (*in_layers, *others),
        tensor_types=frozenset({draw(st.sampled_from(["F16", "Q4_0", "Q4_K", "Q4_1"]))}),
        sliding_window=draw(st.none() | st.just(512)),
        recurrent_state_bytes=draw(st.sampled_from([0, 0, 1 << 20])),
        vocabulary=VocabularySpec(
            num_tokens=draw(st.integers(1, 300_000)), num_merges=0, text_bytes=1000
        ),
        kv_types=draw(st.sampled_from(KV_TYPES)) if is_onnx else KV_TYPES[0],
        cache_copies=draw(st.sampled_from([1, 2])) if is_onnx else 1,
        chat_template=draw(st.none() | st.just("x" * 5000)),
    )


@st.composite
def speculations(draw: st.DrawFn) -> SpeculationConfig:
    tables = [
        DraftTables(
            name=name,
            table_bytes=draw(st.integers(0, MIB)),
            token_bytes=draw(st.integers(0, 20)),
        )
        for name in draw(st.sampled_from([("ngram",), ("trigram",), ("ngram", "trigram")]))
    ]
    rates = DraftRates(acceptance=(draw(st.floats(0, 1)),), siblings=draw(st.floats(0, 1)))
    return speculation_of(
        *tables,
        verify_batch=draw(st.integers(2, 16)),
        draft_model=draw(st.none() | st.just(fake_spec(512))),
        branches=draw(st.booleans()),
        worth=worth_of(tuple(one.name for one in tables), rates),
    )


def token_s(plan: MemoryPlan, spec: ModelSpec) -> float:
    """Return the seconds of a token as the plan promises them: streaming all weights takes a pass's time again."""
    table = plan.speculation
    plain_s = table.worth.costs.of(1) if table else 0.01
    layers = spec.num_layers if plan.resident_layers is None else plan.resident_layers
    streamed = 0.0 if plan.resident_layers is None else 1 - layers / spec.num_layers
    speed_up = table.chosen.speed_up if table and table.chosen else 1.0
    return plain_s * (1 + streamed) / speed_up


@st.composite
def requests(draw: st.DrawFn, spec: ModelSpec) -> PlanRequest:
    filtered = FilterPrefill(num_layers=3, k=256, min_tokens=512)
    return PlanRequest(
        context=draw(st.none() | st.integers(1, spec.context_length)),
        kv_type=draw(st.sampled_from([None, None, None, "f16"]))
        if "f16" in spec.kv_types
        else None,
        batch_size=draw(st.sampled_from([None, None, 1, 32, 512])),
        expected_tokens=draw(st.sampled_from([0, 0, 1, 700, 1500, 10_000])),
        threads=draw(st.sampled_from([1, 8])),
        attention_threads=draw(st.sampled_from([0, 2])),
        optional_attention=draw(st.booleans()),
        optional_repack=draw(st.booleans()),
        attention=draw(
            st.sampled_from([AttentionMemory(), AttentionMemory(filter_prefill=filtered)])
        ),
        prefix_bytes=draw(st.sampled_from([0, 0, 64 * MIB])),
        speculation=draw(st.none() | speculations()),
        compared_tokens=draw(st.sampled_from([0, 0, 100])),
    )


BASELINES = st.builds(
    ProcessBaseline,
    interpreter_bytes=st.just(46 * MIB),
    processor=st.just("x86_64"),
    kv_on_demand=st.booleans(),
    can_stream_weights=st.booleans(),
    repacks=st.booleans(),
)


def plan_of(
    spec: ModelSpec, request: PlanRequest, baseline: ProcessBaseline, num_bytes: int
) -> MemoryPlan:
    return plan_memory(spec, request, Budget(num_bytes=num_bytes, source="a test"), baseline)


def layers_of(plan: MemoryPlan, spec: ModelSpec) -> int:
    return spec.num_layers + 1 if plan.resident_layers is None else plan.resident_layers


def prefix_bytes(plan: MemoryPlan) -> int:
    return sum(line.num_bytes for line in plan.rows if line.component == PREFIXES)


@given(st.data())
def test_a_larger_budget_takes_nothing_away(data: st.DataObject) -> None:
    spec = data.draw(specs())
    request, baseline = data.draw(requests(spec)), data.draw(BASELINES)
    bound = plan_of(spec, request, baseline, 1 << 20).lower_bound_bytes
    most = data.draw(st.sampled_from([bound + 64 * MIB, 2 * bound, 8 * bound, 64 * GIB]))
    budgets = data.draw(st.lists(st.integers(bound, max(most, bound)), min_size=2, max_size=12))
    plans = [plan_of(spec, request, baseline, num_bytes) for num_bytes in sorted(budgets)]
    assert all(plan.fits for plan in plans)
    for small, large in pairwise(plans):
        assert large.context >= small.context
        assert large.kv_tokens >= small.kv_tokens
        assert BETTER_TYPES.index(large.kv_type) >= BETTER_TYPES.index(small.kv_type)
        assert ENOUGH_SHARE * token_s(large, spec) <= token_s(small, spec)
        assert large.batch_size >= small.batch_size
        assert large.own_kernels >= small.own_kernels
        assert large.cache_filter_pass >= small.cache_filter_pass
        assert prefix_bytes(large) >= prefix_bytes(small)
        if (large.context, large.kv_tokens) == (small.context, small.kv_tokens):
            assert layers_of(large, spec) >= layers_of(small, spec)


@given(st.data())
def test_kernels_that_may_be_left_out_never_raise_the_bound(data: st.DataObject) -> None:
    """What fits without lowtide's kernels is planned without them, in the same bytes."""
    spec, baseline = data.draw(specs()), data.draw(BASELINES)
    request = dataclasses.replace(
        data.draw(requests(spec)), optional_attention=True, optional_repack=True
    )
    reference = dataclasses.replace(request, optional_attention=False, optional_repack=False)
    bound = plan_of(spec, reference, baseline, 1 << 20).lower_bound_bytes
    assert plan_of(spec, request, baseline, 1 << 20).lower_bound_bytes <= bound
    smallest = plan_of(spec, request, baseline, bound)
    assert smallest.fits
    largest = plan_of(spec, request, baseline, 1 << 60)
    assert largest.own_kernels and not largest.downgrades
    grown = {
        row.component: row.num_bytes - other.num_bytes
        for row, other in zip(
            largest.rows, plan_of(spec, reference, baseline, 1 << 60).rows, strict=True
        )
    }
    # Loading may shrink, because what follows it is larger; a mapped file is larger than its tensors. The kernels
    # add up the keys that branches of drafts share.
    assert {name for name, num_bytes in grown.items() if num_bytes > 0} <= {
        *(SCRATCH, SPECULATION, WEIGHTS)
    }
    assert grown[WEIGHTS] <= max(spec.file_bytes - spec.weight_bytes, 0)


@given(st.data(), st.integers(1, 8000))
def test_an_expected_prompt_fits_where_any_plan_holds_it(
    data: st.DataObject, expected: int
) -> None:
    """If a plan with a stated context and the smallest choices fits, so does the prompt of one without."""
    spec, baseline = data.draw(specs()), data.draw(BASELINES)
    expected = min(expected, spec.context_length)
    context = min(max(estimates.padded_context(expected), MIN_CONTEXT), spec.context_length)
    all_of_it = dataclasses.replace(baseline, kv_on_demand=False)
    needed = plan_of(spec, PlanRequest(context=context), all_of_it, 1 << 20).lower_bound_bytes
    request = PlanRequest(expected_tokens=expected)
    plan = plan_of(spec, request, baseline, needed + data.draw(st.integers(MIB, GIB)))
    assert plan.fits and plan.kv_tokens >= expected


STREAMING = ProcessBaseline(
    interpreter_bytes=46 * MIB, processor="x86_64", kv_on_demand=True, can_stream_weights=True
)


def test_no_cliff_in_the_default_model(smollm2_spec: ModelSpec) -> None:
    """The context of 4,096 stays while the weights become resident; only then it grows on."""
    plans = [plan_of(smollm2_spec, PlanRequest(), STREAMING, m * MIB) for m in range(70, 400, 2)]
    plans = [plan for plan in plans if plan.fits]
    contexts = [plan.context for plan in plans]
    assert contexts == sorted(contexts) and contexts[-1] == 8192
    usual = [plan for plan in plans if plan.context == USUAL_CONTEXT]
    layers = [layers_of(plan, smollm2_spec) for plan in usual]
    assert layers == sorted(layers) and layers[0] < 10 and layers[-1] == 31
    assert all(plan.resident_layers is None for plan in plans if plan.context > USUAL_CONTEXT)


@pytest.mark.parametrize("mebibytes", [100, 115, 150, 179, 180, 220])
def test_a_prompt_that_is_known_comes_before_resident_weights(
    smollm2_spec: ModelSpec, mebibytes: int
) -> None:
    request = PlanRequest(expected_tokens=954 + 512)
    plan = plan_of(smollm2_spec, request, STREAMING, mebibytes * MIB)
    assert plan.fits and plan.context >= 954 + 512
