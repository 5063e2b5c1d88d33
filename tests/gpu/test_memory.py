"""The plan of a real device: no buffer is larger than its line, and no process than its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import run_python

from lowtide import Runtime
from lowtide.memory.units import MIB
from lowtide.models.gguf.buffers import bytes_on
from lowtide.models.gguf.gpu import GpuDevice

ROUNDING_BYTES = MIB // 100
OPENED = """
from lowtide import Runtime
from lowtide.runtime.planning.plan import LoadConfig, plan_reference
options = dict(
    memory="{memory}", context=256, batch_size=2, threads=1, attention="llama", kv_type="f16", gpu_layers=99
)
"""
PLAN = (
    OPENED
    + """
import json
print(json.dumps(plan_reference("{model}", LoadConfig(**options)).plan.to_dict()))
"""
)
ANSWER = (
    OPENED
    + """
with Runtime.open("{model}", **options) as runtime:
    print(runtime.generate("word1 word2", max_tokens=2, temperature=0).token_ids)
"""
)


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_layers": 99},
        {"gpu_layers": 2},
        {"gpu_layers": 99, "kv_type": "q8_0"},
        {"gpu_layers": 99, "attention": "dense"},
    ],
    ids=str,
)
def test_no_buffer_is_larger_than_its_line(small: Path, options: dict[str, Any]) -> None:
    more = {"attention": "llama", "kv_type": "f16", **options}
    with Runtime.open(
        small, memory="2GiB", context=256, batch_size=2, threads=1, **more
    ) as runtime:
        plan, buffers = runtime.plan, runtime._engine.model.buffers
    assert plan.gpus
    for gpu in plan.gpus:
        planned = {row.component: row.num_bytes for row in gpu.rows}
        for component, num_bytes in bytes_on(buffers, gpu.device.name).items():
            assert num_bytes <= planned[component] + ROUNDING_BYTES, component


def test_the_process_stays_under_its_budget(small: Path) -> None:
    """The smallest budget suffices for an answer, and one that lacks room for the driver's kernels is refused."""
    plan = json.loads(run_python(PLAN.format(model=str(small), memory="2GiB")).stdout)
    driver = next(row["bytes"] for row in plan["rows"] if row["component"] == "GPU driver")
    least = plan["lower_bound_bytes"] + MIB
    done = run_python(ANSWER.format(model=str(small), memory=least))
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= least
    refused = run_python(ANSWER.format(model=str(small), memory=least - driver // 2))
    assert refused.code == 1 and "needs at least" in refused.stderr
    assert refused.peak_bytes <= least - driver // 2


def test_a_software_device_counts_once(small: Path, devices: tuple[GpuDevice, ...]) -> None:
    if not devices[0].shares_memory:
        pytest.skip(f"{devices[0].name} has memory of its own")
    with Runtime.open(
        small, memory="2GiB", context=256, batch_size=2, threads=1, attention="llama", kv_type="f16",
        gpu_layers=99,
    ) as runtime:  # fmt: skip
        plan, buffers = runtime.plan, runtime._engine.model.buffers
    in_process = {row.component: row.num_bytes for row in plan.rows}
    on_device = {row.component: row.num_bytes for row in plan.gpus[0].rows}
    assert on_device["reserve"] == 0 and in_process["GPU driver"] > 0
    assert in_process["KV cache"] == on_device["KV cache"]
    everywhere = sum(one.num_bytes for one in buffers if one.component == "weights")
    assert everywhere <= in_process["weights"] <= 1.05 * everywhere + MIB
