"""The planner: every plan fits or is refused at its lower bound, and reduces in the documented order."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promising_drafts import speculation_of

from lowtide.memory.budget import Budget
from lowtide.memory.plan.estimates import kv_bytes
from lowtide.memory.plan.line import PREFIXES
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import MIN_CONTEXT, plan_memory, require_fit
from lowtide.memory.units import MIB, OverBudget, format_bytes, parse_size
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec

BASELINE = ProcessBaseline(interpreter_bytes=46 * MIB, processor="x86_64")


def budget_of(num_bytes: int) -> Budget:
    return Budget(num_bytes=num_bytes, source="a test")


def plan_of(spec: ModelSpec, mebibytes: float, **options: object) -> MemoryPlan:
    chosen = PlanRequest(**options)  # type: ignore[arg-type]
    return plan_memory(spec, chosen, budget_of(int(mebibytes * MIB)), BASELINE)


def test_weights_are_mapped_unless_llama_cpp_repacks_them() -> None:
    spec = dataclasses.replace(fake_spec(512), tensor_types=frozenset({"Q4_0"}))
    mapped = [
        plan_memory(
            spec, PlanRequest(), budget_of(400 * MIB), dataclasses.replace(BASELINE, repacks=may)
        ).memory_map
        for may in (True, False)
    ]
    assert mapped == [False, True]


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers = draw(st.integers(1, 40))
    head_dim = draw(st.sampled_from([48, 64, 80, 128, 256]))
    return dataclasses.replace(
        fake_spec(draw(st.sampled_from([300, 512, 1000, 8192, 131072]))),
        num_layers=layers,
        embedding_width=draw(st.integers(32, 4096)),
        feed_forward_width=tuple(draw(st.integers(0, 16384)) for _ in range(layers)),
        num_kv_heads=tuple(draw(st.integers(0, 8)) for _ in range(layers)),
        key_head_dim=head_dim,
        value_head_dim=head_dim,
        weight_bytes=draw(st.integers(1, 1 << 33)),
        sliding_window=draw(st.none() | st.just(512)),
    )


OPTIONS = st.builds(
    PlanRequest,
    prefix_bytes=st.just(0) | st.integers(1, 1 << 30),
    speculation=st.none() | st.builds(speculation_of, verify_batch=st.integers(2, 16)),
    context=st.none() | st.integers(1, 300),
    kv_type=st.none() | st.just("f16"),
    batch_size=st.none() | st.integers(1, 512),
)


@given(specs(), OPTIONS, st.integers(1 << 20, 1 << 34))
def test_every_plan(spec: ModelSpec, options: PlanRequest, budget_bytes: int) -> None:
    plan = plan_memory(spec, options, budget_of(budget_bytes), BASELINE)
    assert plan.total_bytes == sum(row.num_bytes for row in plan.rows)
    assert all(row.num_bytes >= 0 for row in plan.rows)
    assert len({row.component for row in plan.rows}) == len(plan.rows)
    assert plan.lower_bound_bytes <= plan.total_bytes
    assert 1 <= plan.context <= spec.context_length
    # A plan does not fit exactly if the budget is below the lower bound,
    assert plan.fits == (budget_bytes >= plan.lower_bound_bytes)
    # and options of the user are never changed.
    if options.context is not None:
        assert plan.context == options.context
    if options.batch_size is not None:
        assert plan.batch_size == options.batch_size
    if options.kv_type is not None:
        assert plan.kv_type == options.kv_type


@given(specs(), OPTIONS)
def test_a_budget_of_the_reported_bound_is_enough(spec: ModelSpec, options: PlanRequest) -> None:
    refused = plan_memory(spec, options, budget_of(1 << 20), BASELINE)
    with pytest.raises(OverBudget) as caught:
        require_fit(refused, spec, options, BASELINE)
    typed = re.search(r"raise memory to (\S+?),", str(caught.value))
    assert typed is not None
    bound = parse_size(typed[1])
    plan = plan_memory(spec, options, budget_of(bound), BASELINE)
    require_fit(plan, spec, options, BASELINE)
    assert bound - plan.lower_bound_bytes < MIB


@given(specs(), st.integers(64, 8192), st.integers(0, 512))
def test_a_larger_budget_never_gives_a_shorter_context(
    spec: ModelSpec, less: int, more: int
) -> None:
    small, large = plan_of(spec, less), plan_of(spec, less + more)
    if small.fits and small.kv_type == large.kv_type:
        assert large.context >= small.context


def test_the_context_is_the_largest_that_fits(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, 250)
    assert plan.fits and plan.kv_type == "f16"
    assert 512 < plan.context < 8192 and plan.context % 256 == 0
    longer = plan_of(smollm2_spec, 250, context=plan.context + 256, kv_type="f16", batch_size=32)
    assert not longer.fits
    assert plan.downgrades == ("batch size: 128 to 32", f"context: 8192 to {plan.context}")


def test_a_large_budget_reduces_nothing(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, 1000)
    assert (plan.context, plan.kv_type, plan.batch_size, plan.downgrades) == (8192, "f16", 128, ())


def test_with_a_context_of_the_user_the_batch_size_shrinks_before_the_kv_type(
    smollm2_spec: ModelSpec,
) -> None:
    needed = plan_of(smollm2_spec, 1000, context=8192).total_bytes / MIB
    assert plan_of(smollm2_spec, needed - 1, context=8192).downgrades == ("batch size: 128 to 64",)
    quantised = plan_of(smollm2_spec, 300, context=8192)
    assert quantised.downgrades[-1] == "KV type: f16 to q8_0"


def prefix_bytes_of(plan: MemoryPlan) -> int | None:
    return next((row.num_bytes for row in plan.rows if row.component == PREFIXES), None)


def test_the_prefix_cache_shrinks_before_anything_else(smollm2_spec: ModelSpec) -> None:
    """The rest of the plan is as without a prefix cache, which gets the remaining memory."""
    without = plan_of(smollm2_spec, 1000, context=4096)
    assert prefix_bytes_of(without) is None
    options = {"context": 4096, "prefix_bytes": 64 * MIB}
    whole = plan_of(smollm2_spec, 1000, **options)
    assert prefix_bytes_of(whole) == 64 * MIB and whole.downgrades == ()
    assert whole.total_bytes == without.total_bytes + 64 * MIB
    needed = without.total_bytes / MIB
    for mebibytes in range(int(needed) + 1, int(needed) + 80):
        plan = plan_of(smollm2_spec, mebibytes, **options)
        plain = plan_of(smollm2_spec, mebibytes, context=4096)
        cache_bytes = prefix_bytes_of(plan)
        assert plan.fits and cache_bytes is not None
        assert plan.rows == (
            *plain.rows[: len(plain.rows) - 2],
            *(row for row in plan.rows if row.component == PREFIXES),
            *plain.rows[-2:],
        )
        step = f"prefix cache: 64.0 MiB to {format_bytes(cache_bytes)}"
        assert plan.downgrades == ((step,) if cache_bytes < 64 * MIB else ())
        # If anything is left of it, the watchdog has no reason to release it.
        assert cache_bytes == 0 or plan.total_bytes <= 0.95 * plan.budget.num_bytes
    tight = plan_of(smollm2_spec, needed - 10, **options)
    assert (
        tight.downgrades[0].startswith("prefix cache: 64.0 MiB to ") and len(tight.downgrades) > 1
    )
    assert tight.lower_bound_bytes == without.lower_bound_bytes


STREAMING_BASELINE = dataclasses.replace(BASELINE, kv_on_demand=True, can_stream_weights=True)


def streaming_plan_of(spec: ModelSpec, mebibytes: float, **options: object) -> MemoryPlan:
    chosen = PlanRequest(**options)  # type: ignore[arg-type]
    return plan_memory(spec, chosen, budget_of(int(mebibytes * MIB)), STREAMING_BASELINE)


def test_weights_are_streamed_before_the_kv_type_changes(smollm2_spec: ModelSpec) -> None:
    resident = plan_of(smollm2_spec, 1000, context=2048, batch_size=32)
    assert resident.resident_layers is None
    less = resident.total_bytes / MIB - 40
    plan = streaming_plan_of(smollm2_spec, less, context=2048)
    assert plan.fits and plan.kv_type == "f16" and plan.kv_tokens == 2048
    # As many layers as fit stay resident.
    assert plan.resident_layers is not None and 0 < plan.resident_layers < 30
    fewer = streaming_plan_of(smollm2_spec, less - 10, context=2048)
    assert fewer.resident_layers is not None and fewer.resident_layers < plan.resident_layers
    assert plan.downgrades[-1].startswith("weights: streamed")


def test_a_context_of_the_user_gets_the_largest_cache_that_fits(
    smollm2_spec: ModelSpec,
) -> None:
    plan = streaming_plan_of(smollm2_spec, 120, context=8192)
    assert plan.fits and plan.context == 8192 and plan.kv_type == "f16"
    assert 512 <= plan.kv_tokens < 8192
    assert any(step.startswith("KV cache: 8192 to") for step in plan.downgrades)
    assert streaming_plan_of(smollm2_spec, 130, context=8192).kv_tokens > plan.kv_tokens


@given(st.integers(60, 400), st.none() | st.integers(1, 8192))
def test_every_streaming_plan(smollm2_spec: ModelSpec, mebibytes: int, context: int | None) -> None:
    plan = streaming_plan_of(smollm2_spec, mebibytes, context=context)
    assert plan.fits == (plan.budget.num_bytes >= plan.lower_bound_bytes)
    assert plan.kv_tokens <= plan.context and (context is None or plan.context == context)
    assert plan.memory_map or plan.resident_layers is None


def test_a_context_that_may_be_chosen_shrinks_before_the_kv_type_changes(
    smollm2_spec: ModelSpec,
) -> None:
    bound = plan_of(smollm2_spec, 1).lower_bound_bytes / MIB
    plans = [plan_of(smollm2_spec, bound + more) for more in range(13)]
    assert plans[0].kv_type != "f16" and plans[-1].kv_type == "f16"
    assert all(plan.context == MIN_CONTEXT for plan in plans if plan.kv_type != "f16")


def test_the_error_offers_a_context_that_fits(smollm2_spec: ModelSpec) -> None:
    options = PlanRequest(context=8192)
    plan = plan_memory(smollm2_spec, options, budget_of(200 * MIB), BASELINE)
    with pytest.raises(OverBudget, match="shorten context to") as caught:
        require_fit(plan, smollm2_spec, options, BASELINE)
    context = int(caught.value.hint.split("shorten context to ")[1].split(",")[0])
    assert plan_of(smollm2_spec, 200, context=context).fits


def test_kv_bytes_equal_those_of_llama_cpp(smollm2_spec: ModelSpec) -> None:
    # From llama.cpp's memory breakdown.
    assert kv_bytes(smollm2_spec, 8192, "f16") == 180 * MIB
    assert kv_bytes(smollm2_spec, 8192, "q8_0") == int(95.625 * MIB)
    assert kv_bytes(smollm2_spec, 8000, "q4_0") == kv_bytes(smollm2_spec, 7937, "q4_0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"kv_type": "q2"}, "one of f16, q8_0, q4_0, f32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": 9000}, "was trained for 8192"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, smollm2_spec: ModelSpec) -> None:
    with pytest.raises(BadOption, match=message):
        plan_of(smollm2_spec, 1000, **options)


def test_an_odd_head_dim_has_no_quantised_cache(smollm2_spec: ModelSpec) -> None:
    odd = dataclasses.replace(smollm2_spec, key_head_dim=80)
    with pytest.raises(BadOption, match="multiple of 32"):
        plan_of(odd, 1000, kv_type="q8_0")
    assert plan_of(odd, 1).kv_type == "f16"


def test_the_table_and_the_json(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, 300)
    values = plan.to_dict()
    assert values["total_bytes"] == sum(row["bytes"] for row in values["rows"])
    assert {"budget_bytes", "lower_bound_bytes", "fits", "context", "downgrades"} <= set(values)
    heading, *lines = str(plan).splitlines()
    assert heading.split() == ["Component", "Size", "Why"]
    assert [line.split("  ")[0] for line in lines[: len(plan.rows)]] == [
        row.component for row in plan.rows
    ]
    assert lines[len(plan.rows)].startswith("planned peak  ")
    assert lines[-1].startswith("Reduced to fit: ")


@given(specs(), OPTIONS, st.integers(1 << 20, 1 << 34), st.integers(1, 1 << 20))
def test_a_plan_that_gives_nothing_up_is_the_same_for_every_prompt(
    spec: ModelSpec, options: PlanRequest, budget_bytes: int, expected: int
) -> None:
    """The tokens of a prompt are counted only where something is given up."""
    budget = budget_of(budget_bytes)
    unknown = plan_memory(spec, options, budget, BASELINE)
    if unknown.fits and not unknown.downgrades:
        known = dataclasses.replace(options, expected_tokens=expected)
        assert plan_memory(spec, known, budget, BASELINE) == unknown
