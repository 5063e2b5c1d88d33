"""Layers on GPUs: what is on which device, and what stays in RAM."""

from __future__ import annotations

import dataclasses

import pytest
from gpus import gpu, gpu_budget
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.budget import Budget
from lowtide.memory.plan import estimates
from lowtide.memory.plan import line as components
from lowtide.memory.plan.driver import DriverMemory
from lowtide.memory.plan.gpu import GpuBudget, GpuLayers, GpuPlan, parse_gpu_layers
from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import plan_memory, require_fit
from lowtide.memory.plan.speculation.allocator import SpeculationChoice
from lowtide.memory.units import MIB, BadSize, OverBudget
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import fake_spec
from lowtide.models.spec import ModelSpec

BASELINE = ProcessBaseline(interpreter_bytes=46 * MIB, processor="x86_64")
LAYERS = 30
CANDIDATE = PlanCandidate(context=2048, batch_size=128, kv_type="f16", kv_tokens=2048)


def plan_of(
    spec: ModelSpec,
    budget: GpuBudget | None,
    mebibytes: float = 4000,
    baseline: ProcessBaseline = BASELINE,
    context: int | None = 2048,
    kv_type: str | None = "f16",
) -> MemoryPlan:
    options = PlanRequest(context=context, kv_type=kv_type, gpu=budget)
    limit = Budget(num_bytes=int(mebibytes * MIB), source="a test")
    return plan_memory(spec, options, limit, baseline)


def bytes_of(plan: MemoryPlan | GpuPlan) -> dict[str, int]:
    return {row.component: row.num_bytes for row in plan.rows}


def test_a_plan_without_a_gpu(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, None)
    assert (plan.gpus, plan.gpu_layers) == ((), 0)
    assert plan_of(smollm2_spec, gpu_budget(0)).rows[2].why == plan.rows[2].why


def test_the_output_matrix_moves_first_and_then_the_last_layer(smollm2_spec: ModelSpec) -> None:
    groups = smollm2_spec.weight_groups
    embedding = next(g.num_bytes for g in groups if g.name == "token_embd.weight")
    output, two = (
        bytes_of(plan_of(smollm2_spec, gpu_budget(n)).gpus[0])[components.WEIGHTS] for n in (1, 2)
    )
    # The embedding of this model is its output matrix as well: the device gets a copy.
    assert embedding <= output < embedding + MIB
    assert groups[LAYERS - 1].num_bytes <= two - output < groups[LAYERS - 1].num_bytes + MIB


def test_weights_and_cache_on_a_device_are_not_in_the_process(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(99))
    (device,) = plan.gpus
    assert device.num_layers == plan.gpu_layers == LAYERS + 1
    layers = sum(g.num_bytes for g in smollm2_spec.weight_groups if g.layer is not None)
    assert bytes_of(plan)[components.WEIGHTS] == smollm2_spec.weight_bytes - layers
    whole = estimates.kv_bytes(smollm2_spec, 2048, "f16")
    assert (bytes_of(plan)[components.CACHE], bytes_of(device)[components.CACHE]) == (0, whole)
    assert plan.gpu_cache_bytes == whole and not plan.memory_map
    half = plan_of(smollm2_spec, gpu_budget(16))
    assert (
        bytes_of(half)[components.CACHE] == bytes_of(half.gpus[0])[components.CACHE] == whole // 2
    )


def test_the_cache_stays_in_ram_with_the_attention(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, holds_cache=False))
    on_gpu = plan_of(smollm2_spec, gpu_budget(31))
    whole = estimates.kv_bytes(smollm2_spec, 2048, "f16")
    assert (bytes_of(plan)[components.CACHE], bytes_of(plan.gpus[0])[components.CACHE]) == (
        whole,
        0,
    )
    assert "stays in RAM" in str(plan)
    # The output projection of the attention stays too: it decides where attention is computed.
    projections = sum(g.projection_bytes for g in smollm2_spec.weight_groups)
    assert projections > 0
    in_ram = [bytes_of(one)[components.WEIGHTS] for one in (plan, on_gpu)]
    assert in_ram[0] - in_ram[1] == projections
    on_device = [bytes_of(one.gpus[0])[components.WEIGHTS] for one in (plan, on_gpu)]
    assert on_device[1] - on_device[0] == projections


def test_a_device_copies_the_cache_if_it_computes_the_attention(
    smollm2_spec: ModelSpec,
) -> None:
    groups = (dataclasses.replace(g, projection_bytes=0) for g in smollm2_spec.weight_groups)
    odd = dataclasses.replace(smollm2_spec, weight_groups=tuple(groups))
    budget = gpu_budget(31, holds_cache=False)
    known, unknown = (
        bytes_of(plan_of(spec, budget).gpus[0])[components.COMPUTE] for spec in (smollm2_spec, odd)
    )
    assert unknown - known == estimates.kv_bytes(odd, 2048, "f16") // LAYERS


@given(
    free=st.lists(st.integers(10, 400), min_size=1, max_size=3),
    context=st.none() | st.integers(1, 8192),
    holds_cache=st.booleans(),
    mebibytes=st.integers(60, 600),
)
def test_as_many_layers_as_fit(
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


def test_the_next_device_takes_the_layers_that_do_not_fit(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, gpu("A", 140), gpu("B", 1000)))
    assert plan.fits and [device.device.name for device in plan.gpus] == ["A", "B"]
    assert plan.gpus[0].num_layers > 0 and plan.gpu_layers == 31
    alone = plan_of(smollm2_spec, gpu_budget(31, gpu("A", 1000), gpu("B", 1000)))
    assert [device.device.name for device in alone.gpus] == ["A"]


def test_the_error_of_a_small_device_has_both_sizes(smollm2_spec: ModelSpec) -> None:
    budget = gpu_budget(31, gpu("GPU0", 120))
    plan = plan_of(smollm2_spec, budget)
    options = PlanRequest(context=2048, kv_type="f16", gpu=budget)
    with pytest.raises(
        OverBudget, match="31 layers on GPU0.*the limit is 120.0 MiB.*auto takes"
    ) as caught:
        require_fit(plan, smollm2_spec, options, BASELINE)
    raised = gpu_budget(31, gpu("GPU0", caught.value.needed_bytes / MIB + 1))
    assert plan_of(smollm2_spec, raised).fits
    # The reported minimum has the smallest KV type, if the type may be chosen.
    any_type = plan_of(smollm2_spec, budget, kv_type=None)
    assert not any_type.fits and any_type.kv_type == "q4_0"
    assert any_type.gpus[0].total_bytes < plan.gpus[0].total_bytes
    assert not plan.to_dict()["fits"] and not plan.to_dict()["gpus"][0]["fits"]


def test_a_context_that_may_be_chosen_shrinks_until_the_layers_fit(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, gpu("GPU0", 220)), context=None)
    assert plan.fits and plan.gpu_layers == 31 and 512 <= plan.context < 8192


def test_weights_are_not_streamed_with_a_gpu(smollm2_spec: ModelSpec) -> None:
    baseline = dataclasses.replace(BASELINE, can_stream_weights=True)
    assert plan_of(smollm2_spec, None, 130, baseline).resident_layers is not None
    assert plan_of(smollm2_spec, gpu_budget(1), 130, baseline).resident_layers is None


def test_shared_device_memory_counts_in_the_process(smollm2_spec: ModelSpec) -> None:
    separate = plan_of(smollm2_spec, gpu_budget(31))
    shared = plan_of(smollm2_spec, gpu_budget(31, gpu(shares_memory=True)))
    (device,) = shared.gpus
    differences = {
        component: bytes_of(shared)[component] - num_bytes
        for component, num_bytes in bytes_of(separate).items()
        if component != components.LOADING
    }
    assert sum(differences.values()) == device.total_bytes


def test_the_table_and_the_json(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(10))
    assert "GPU0: Simulated" in str(plan) and "total on GPU0" in str(plan)
    values = plan.to_dict()
    assert values["gpu_layers"] == 10
    (device,) = values["gpus"]
    assert device["total_bytes"] == sum(row["bytes"] for row in device["rows"])
    assert {"name", "description", "shares_memory", "free_bytes", "budget_bytes"} <= set(device)
    assert values["total_bytes"] == sum(row["bytes"] for row in values["rows"])


def test_the_budget_of_a_device() -> None:
    assert gpu_budget(None, gpu("GPU0", 100), memory=None).device_bytes == (100 * MIB,)
    assert gpu_budget(None, gpu("GPU0", 100), memory="50%").device_bytes == (50 * MIB,)
    with pytest.raises(BadOption, match="GPU0 has 100.0 MiB free: ask for less"):
        gpu_budget(None, gpu("GPU0", 100), memory="1GiB")
    with pytest.raises(BadSize):
        gpu_budget(None, memory="much")


def test_the_plan_says_what_another_gib_would_take(smollm2_spec: ModelSpec) -> None:
    devices = gpu("A", 120), gpu("B", 100, shares_memory=True)
    plan = plan_of(smollm2_spec, gpu_budget(None, devices[0]))
    assert plan.more_gpu_layers == {"A": LAYERS + 1 - plan.gpu_layers} and plan.gpu_layers > 0
    assert f"Another GiB on A would take {LAYERS + 1 - plan.gpu_layers} more layers" in str(plan)
    whole = plan_of(smollm2_spec, gpu_budget(None, gpu("A", 1000), devices[1]))
    assert whole.more_gpu_layers == {"A": 0} and "Another GiB" not in str(whole)


def test_the_reserve_of_a_device_is_what_was_measured(smollm2_spec: ModelSpec) -> None:
    """Without a measurement it is an estimate: a tenth of a device without a limit, and never little."""
    device = gpu("GPU0", 1000)
    free, limited = (gpu_budget(31, device, memory=memory) for memory in (None, "500MiB"))
    reserves = [
        bytes_of(plan_of(smollm2_spec, budget).gpus[0])[components.RESERVE]
        for budget in (free, limited)
    ]
    assert reserves == [100 * MIB, 64 * MIB]
    driver = DriverMemory(process_bytes=70 * MIB, device_bytes={"GPU0": 3 * MIB})
    plan = plan_of(smollm2_spec, dataclasses.replace(free, driver=driver))
    assert bytes_of(plan.gpus[0])[components.RESERVE] == 3 * MIB
    assert bytes_of(plan)[components.DRIVER] == 70 * MIB and "measured" in str(plan)
    assert components.DRIVER not in bytes_of(plan_of(smollm2_spec, None))


def test_the_logits_of_drafts_are_in_one_line(smollm2_spec: ModelSpec) -> None:
    """A device of its own holds a copy in its compute buffer; a shared one's is in the line for speculation."""
    drafting = dataclasses.replace(
        CANDIDATE, speculation=SpeculationChoice(drafts=("ngram",), verify_batch=5)
    )
    for shares_memory, num_rows in ((False, 4), (True, 0)):
        layers = GpuLayers(smollm2_spec, gpu_budget(31, gpu(shares_memory=shares_memory)))
        plain, more = (
            bytes_of(layers.place(one)[0])[components.COMPUTE] for one in (CANDIDATE, drafting)
        )
        assert more - plain == num_rows * 4 * smollm2_spec.vocabulary.num_tokens


def test_a_device_in_main_memory_has_no_reserve_of_its_own(smollm2_spec: ModelSpec) -> None:
    plan = plan_of(smollm2_spec, gpu_budget(31, gpu(shares_memory=True), memory=None))
    assert bytes_of(plan.gpus[0])[components.RESERVE] == 0
    assert bytes_of(plan)[components.DRIVER] > 0


def test_layers_as_text() -> None:
    assert [parse_gpu_layers(text) for text in ("auto", "0", 7, " 12 ")] == [None, 0, 7, 12]
    for wrong in ("all of them", "-1", -1, "1.5"):
        with pytest.raises(BadOption, match="it must be a number of layers or auto"):
            parse_gpu_layers(wrong)


def test_a_model_with_unknown_layer_sizes() -> None:
    with pytest.raises(BadOption, match="the sizes of fake's layers are unknown"):
        plan_of(fake_spec(512), gpu_budget(1), context=512)
