from __future__ import annotations

import dataclasses

import pytest
from gpus import gpu, gpu_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.memory.budget import Budget
from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan import line as components
from lowtide.memory.plan.gpu import GpuBudget, GpuPlan, parse_gpu_layers
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import plan_memory, require_fit
from lowtide.memory.units import MIB, BadSize, OverBudget
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec

BASELINE = ProcessBaseline(interpreter_bytes=46 * MIB, processor="x86_64")
LAYERS = 30


def plan_of(
    spec: ModelSpec,
    budget: GpuBudget | None,
    mebibytes: float = 4000,
    baseline: ProcessBaseline = BASELINE,
    context: int | None = 2048,
    kv_type: str | None = "f16",
) -> MemoryPlan:
    options = PlanRequest(context=context, kv_type=kv_type, gpu=budget)
    stated = Budget(num_bytes=int(mebibytes * MIB), source="a test")
    return plan_memory(spec, options, stated, baseline)


def rows_of(plan: MemoryPlan | GpuPlan) -> dict[str, int]:
    return {row.component: row.num_bytes for row in plan.rows}


def test_without_a_device_nothing_is_told_of_one(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, None)
    assert (plan.gpus, plan.gpu_layers) == ((), 0)
    assert plan_of(smollm2_spec, gpu_budget(0)).rows[2].why == plan.rows[2].why


def test_the_output_goes_first_and_then_the_last_layer(smollm2_spec: ModelSpec) -> None:
    groups = smollm2_spec.weight_groups
    embedding = next(g.num_bytes for g in groups if g.name == "token_embd.weight")
    output, two = (
        rows_of(plan_of(smollm2_spec, gpu_budget(n)).gpus[0])[components.WEIGHTS] for n in (1, 2)
    )
    # The embedding is the output's matrix too in this model: the device gets a copy.
    assert embedding <= output < embedding + MIB
    assert groups[LAYERS - 1].num_bytes <= two - output < groups[LAYERS - 1].num_bytes + MIB


def test_what_a_device_holds_leaves_the_process(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(99))
    (device,) = plan.gpus
    assert device.num_layers == plan.gpu_layers == LAYERS + 1
    layers = sum(g.num_bytes for g in smollm2_spec.weight_groups if g.layer is not None)
    assert rows_of(plan)[components.WEIGHTS] == smollm2_spec.weight_bytes - layers
    whole = footprint.kv_bytes(smollm2_spec, 2048, "f16")
    assert (rows_of(plan)[components.CACHE], rows_of(device)[components.CACHE]) == (0, whole)
    assert plan.gpu_cache_bytes == whole and not plan.memory_map
    half = plan_of(smollm2_spec, gpu_budget(16))
    assert rows_of(half)[components.CACHE] == rows_of(half.gpus[0])[components.CACHE] == whole // 2


def test_the_cache_stays_with_our_attention(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, holds_cache=False))
    there = plan_of(smollm2_spec, gpu_budget(31))
    whole = footprint.kv_bytes(smollm2_spec, 2048, "f16")
    assert (rows_of(plan)[components.CACHE], rows_of(plan.gpus[0])[components.CACHE]) == (whole, 0)
    assert "stays in RAM" in str(plan)
    # So does the matrix behind attention, which decides where attention is computed.
    stays = sum(g.projection_bytes for g in smollm2_spec.weight_groups)
    assert stays > 0
    kept, given_away = rows_of(plan)[components.WEIGHTS], rows_of(there)[components.WEIGHTS]
    assert kept - given_away == stays
    on_device = [rows_of(some.gpus[0])[components.WEIGHTS] for some in (plan, there)]
    assert on_device[1] - on_device[0] == stays


def test_a_device_reads_the_cache_of_a_model_whose_attention_it_computes(
    smollm2_spec: ModelSpec,
) -> None:
    groups = (dataclasses.replace(g, projection_bytes=0) for g in smollm2_spec.weight_groups)
    odd = dataclasses.replace(smollm2_spec, weight_groups=tuple(groups))
    budget = gpu_budget(31, holds_cache=False)
    known, unknown = (
        rows_of(plan_of(spec, budget).gpus[0])[components.COMPUTE] for spec in (smollm2_spec, odd)
    )
    assert unknown - known == footprint.kv_bytes(odd, 2048, "f16") // LAYERS


@settings(max_examples=100, deadline=None)
@given(
    free=st.lists(st.integers(10, 400), min_size=1, max_size=3),
    context=st.none() | st.integers(1, 8192),
    holds_cache=st.booleans(),
    mebibytes=st.integers(60, 600),
)
def test_as_many_as_fit(
    smollm2_spec: ModelSpec,
    free: list[int],
    context: int | None,
    holds_cache: bool,
    mebibytes: int,
) -> None:
    devices = [gpu(f"GPU{i}", size) for i, size in enumerate(free)]
    budget = gpu_budget(None, *devices, holds_cache=holds_cache)
    plan = plan_of(smollm2_spec, budget, mebibytes, context=context, kv_type=None)
    assert all(device.fits and device.num_layers > 0 for device in plan.gpus)
    assert plan.fits == (plan.budget.num_bytes >= plan.lower_bound_bytes)
    if plan.gpu_layers <= LAYERS:
        more = dataclasses.replace(budget, layers=plan.gpu_layers + 1)
        refused = plan_memory(
            smollm2_spec,
            PlanRequest(
                context=plan.context, kv_type=plan.kv_type, batch_size=plan.batch_size, gpu=more
            ),
            plan.budget,
            BASELINE,
        )
        assert not refused.fits and not all(device.fits for device in refused.gpus)


def test_the_next_device_takes_what_the_first_has_no_room_for(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, gpu("A", 140), gpu("B", 1000)))
    assert plan.fits and [device.device.name for device in plan.gpus] == ["A", "B"]
    assert plan.gpus[0].num_layers > 0 and plan.gpu_layers == 31
    alone = plan_of(smollm2_spec, gpu_budget(31, gpu("A", 1000), gpu("B", 1000)))
    assert [device.device.name for device in alone.gpus] == ["A"]


def test_a_device_that_is_too_small_is_told_with_both_numbers(smollm2_spec: ModelSpec) -> None:
    budget = gpu_budget(31, gpu("GPU0", 120))
    plan = plan_of(smollm2_spec, budget)
    options = PlanRequest(context=2048, kv_type="f16", gpu=budget)
    with pytest.raises(
        OverBudget, match="31 layers on GPU0.*120.0 MiB allowed.*auto takes"
    ) as caught:
        require_fit(plan, smollm2_spec, options, BASELINE)
    raised = gpu_budget(31, gpu("GPU0", caught.value.needed_bytes / MIB + 1))
    assert plan_of(smollm2_spec, raised).fits
    # The least that is told has the smallest type of the cache, where that may be chosen.
    opened = plan_of(smollm2_spec, budget, kv_type=None)
    assert not opened.fits and opened.kv_type == "q4_0"
    assert opened.gpus[0].total_bytes < plan.gpus[0].total_bytes
    assert not plan.to_dict()["fits"] and not plan.to_dict()["gpus"][0]["fits"]


def test_an_open_context_shrinks_until_the_layers_fit(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, gpu("GPU0", 220)), context=None)
    assert plan.fits and plan.gpu_layers == 31 and 512 <= plan.context < 8192


def test_weights_are_not_read_again_beside_a_device(smollm2_spec: ModelSpec) -> None:
    baseline = dataclasses.replace(BASELINE, can_stream_weights=True)
    assert plan_of(smollm2_spec, None, 130, baseline).resident_layers is not None
    assert plan_of(smollm2_spec, gpu_budget(1), 130, baseline).resident_layers is None


def test_memory_that_is_shared_is_in_the_budget(smollm2_spec: ModelSpec) -> None:
    apart = plan_of(smollm2_spec, gpu_budget(31))
    shared = plan_of(smollm2_spec, gpu_budget(31, gpu(shares_memory=True)))
    (device,) = shared.gpus
    beyond = {
        component: rows_of(shared)[component] - num_bytes
        for component, num_bytes in rows_of(apart).items()
        if component != components.LOADING
    }
    assert sum(beyond.values()) == device.total_bytes


def test_the_plan_for_people_and_programs(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(10))
    assert "GPU0: Simulated" in str(plan) and "on GPU0" in str(plan)
    told = plan.to_dict()
    assert told["gpu_layers"] == 10
    (device,) = told["gpus"]
    assert device["total_bytes"] == sum(row["bytes"] for row in device["rows"])
    assert {"name", "description", "shares_memory", "free_bytes", "budget_bytes"} <= set(device)
    assert told["total_bytes"] == sum(row["bytes"] for row in told["rows"])


def test_what_a_device_may_give() -> None:
    assert gpu_budget(None, gpu("GPU0", 100), memory=None).device_bytes == (90 * MIB,)
    assert gpu_budget(None, gpu("GPU0", 100), memory="50%").device_bytes == (50 * MIB,)
    with pytest.raises(BadOption, match="GPU0 has 100.0 MiB free: ask for less"):
        gpu_budget(None, gpu("GPU0", 100), memory="1GiB")
    with pytest.raises(BadSize):
        gpu_budget(None, memory="much")


def test_how_layers_are_written() -> None:
    assert [parse_gpu_layers(text) for text in ("auto", "0", 7, " 12 ")] == [None, 0, 7, 12]
    for wrong in ("all of them", "-1", -1, "1.5"):
        with pytest.raises(BadOption, match="a number of layers or auto is wanted"):
            parse_gpu_layers(wrong)


def test_a_model_of_unknown_layers() -> None:
    with pytest.raises(BadOption, match="the sizes of fake's layers are not known"):
        plan_of(fake_spec(512), gpu_budget(1), context=512)
