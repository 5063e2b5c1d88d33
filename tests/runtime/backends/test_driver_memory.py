"""What a GPU's driver takes is measured in a process of its own: its answers, and how it may end. No device is used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_files import write_model
from gpus import gpu

from lowtide import Runtime
from lowtide.memory.plan.driver import ESTIMATED_PROCESS_BYTES
from lowtide.memory.units import MIB, OverBudget
from lowtide.models.errors import ForwardError
from lowtide.models.read_spec import read_spec
from lowtide.runtime.backends import driver_memory
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.driver_worker import pass_sizes
from lowtide.runtime.planning.plan import plan_spec

OPTIONS: dict[str, Any] = {"context": 256, "attention": "llama", "kv_type": "f16"}


class Worker:
    """Stands for the process: what it is asked, and how it ends."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.ended_by = 0
        self.answer: dict[str, Any] = {
            "process_bytes": 80 * MIB,
            "device_bytes": {"GPU0": 8 * MIB},
            "libraries": [],
        }

    def run(self, *_command: Any, input: str, **_options: Any) -> SimpleNamespace:
        self.requests.append(json.loads(input))
        return SimpleNamespace(
            returncode=-self.ended_by, stdout=f"noise\n{json.dumps(self.answer)}\n"
        )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A machine with a device of 1000 MiB, and a process that answers as it should."""
    made = Worker()
    monkeypatch.setattr("lowtide.models.gguf.gpu.read_gpu_devices", lambda: (gpu("GPU0"),))
    monkeypatch.setattr(driver_memory, "device_address", lambda _name: 1)
    monkeypatch.setattr(driver_memory, "_not_stored", {})
    started = SimpleNamespace(run=made.run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(driver_memory, "subprocess", started)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", heads=2)


def lines_of(model: Path, **options: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the lines of the process and of the device."""
    config = LoadConfig(memory="2GiB", **{"gpu_layers": 99, **OPTIONS, **options})
    plan = plan_spec(read_spec(model), config).plan
    of_device = {row.component: row.num_bytes for row in plan.gpus[0].rows}
    return {row.component: row.num_bytes for row in plan.rows}, of_device


def test_what_was_measured_is_in_the_plan(worker: Worker, model: Path) -> None:
    in_process, on_device = lines_of(model)
    assert in_process["GPU driver"] == 90 * MIB and on_device["reserve"] == 9 * MIB
    (request,) = worker.requests
    assert request["gpu_layers"] == [["GPU0", 3]]
    assert request["options"]["kv_type"] == "f16" and request["options"]["gpu_attention"]


def test_it_is_measured_again_for_more_layers_and_other_kernels(
    worker: Worker, model: Path
) -> None:
    for layers, times in ((2, 1), (1, 1), (3, 2), (2, 2)):
        lines_of(model, gpu_layers=layers)
        assert len(worker.requests) == times
    lines_of(model, attention="dense")
    lines_of(model, kv_type="q8_0")
    assert len(worker.requests) == 4


def test_a_budget_without_room_for_the_driver_is_refused(worker: Worker, model: Path) -> None:
    worker.answer["process_bytes"] = 800 * MIB
    with pytest.raises(OverBudget, match="needs at least .* the limit is 800.0 MiB"):
        Runtime.open(model, memory="800MiB", gpu_layers=99, **OPTIONS)


@pytest.mark.parametrize(
    ("ended_by", "answer", "message"),
    [
        (signal.SIGSEGV, None, "a first pass on GPU0 ended its process .Segmentation fault."),
        (0, {"error": "the device was lost"}, "a first pass on GPU0 failed: the device was lost"),
    ],
)
def test_a_device_that_fails_in_the_measurement(
    worker: Worker, model: Path, ended_by: int, answer: Any, message: str
) -> None:
    worker.ended_by, worker.answer = ended_by, answer or worker.answer
    with pytest.raises(ForwardError, match=message):
        lines_of(model)


def test_without_a_measurement_it_is_an_estimate(
    worker: Worker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.ended_by = signal.SIGKILL
    in_process, on_device = lines_of(model)
    assert len(worker.requests) == 1
    assert in_process["GPU driver"] == ESTIMATED_PROCESS_BYTES and on_device["reserve"] == 100 * MIB

    def cannot_start(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(driver_memory.subprocess, "run", cannot_start)
    assert lines_of(model)[0]["GPU driver"] == ESTIMATED_PROCESS_BYTES


def test_the_sizes_of_passes() -> None:
    assert pass_sizes(1) == (1,)
    assert pass_sizes(4) == (1, 2, 3, 4)
    assert pass_sizes(40) == (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 40)


def test_the_worker_measures_a_model_on_the_processor(model: Path) -> None:
    """Without layers on a device there is no driver: what the process grows by are the buffers, but for a few MiB."""
    program = driver_memory.WORKER_CODE
    options = {"context": 512, "batch_size": 2, "kv_type": "f16", "gpu_attention": True}
    request = {"path": str(model), "gpu_layers": [], "options": options}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["process_bytes"] < 16 * MIB and answer["device_bytes"] == {}
    assert any("llama" in Path(path).name for path in answer["libraries"])
