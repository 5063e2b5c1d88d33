"""The trial of a first pass in a new process, as models with layers on GPUs have it."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from gpus import gpu

from lowtide.memory.plan.gpu import GpuPlan
from lowtide.models.gguf.parameters import DeviceLayers, LoadOptions
from lowtide.runtime.backends import first_pass
from lowtide.runtime.backends.first_pass import try_first_pass
from lowtide.runtime.errors import ForwardError
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

OPTIONS = LoadOptions(context=512, batch_size=32, threads=2)


def model_of_type(path: Path, tensor: str, kind: type) -> Path:
    def changed(name: str, values: np.ndarray) -> np.ndarray:
        return (values * 100).astype(kind) if name == tensor else values

    return write_model(path, changed=changed)


def test_a_whole_model_passes(tmp_path: Path) -> None:
    assert try_first_pass(write_model(tmp_path / "m.gguf"), OPTIONS) is None


@pytest.mark.parametrize(
    ("tensor", "kind", "reason"),
    [
        ("output_norm.weight", np.float16, "a forward pass of 1 tokens at 0 failed"),
        ("blk.1.ffn_down.weight", np.int16, "it ended the process"),
    ],
)
def test_a_type_without_a_kernel_has_a_reason(
    tmp_path: Path, tensor: str, kind: type, reason: str
) -> None:
    found = try_first_pass(model_of_type(tmp_path / "m.gguf", tensor, kind), OPTIONS)
    assert found and reason in found and "\n" not in found


def test_what_cannot_be_loaded_is_left_to_loading(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-500])
    assert try_first_pass(path, OPTIONS) is None


@pytest.mark.parametrize(
    ("ended_by", "is_refused"), [(signal.SIGSEGV, True), (signal.SIGKILL, False)]
)
def test_a_process_that_somebody_killed_says_nothing_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: int, is_refused: bool
) -> None:
    program = f"import os; os.kill(os.getpid(), {int(ended_by)})"
    monkeypatch.setattr(first_pass, "PROGRAM", program)
    reason = try_first_pass(write_model(tmp_path / "m.gguf"), OPTIONS)
    assert (reason is not None) == is_refused


def test_a_model_with_layers_on_a_gpu_is_tried_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: the plan says that one has a layer, and the trial is made without."""
    path = model_of_type(tmp_path / "odd.gguf", "output_norm.weight", np.float16)
    planned = plan_reference(
        path, LoadConfig(memory="2GiB", context=256, attention="llama", repack=False)
    )
    layers = DeviceLayers("GPU0", 1)
    on_gpu = GpuPlan(
        device=gpu(layers.device), budget_bytes=1 << 30, num_layers=layers.num_layers, rows=()
    )
    plan = dataclasses.replace(planned.plan, gpus=(on_gpu,))
    tried: list[LoadOptions] = []

    def without_gpu(path: Path, options: LoadOptions) -> str | None:
        tried.append(options)
        return try_first_pass(path, dataclasses.replace(options, gpu_layers=()))

    monkeypatch.setattr("lowtide.runtime.backends.gguf.try_first_pass", without_gpu)
    with pytest.raises(ForwardError, match=r"cannot compute .*output_norm.weight \(F16\)"):
        Engine(dataclasses.replace(planned, plan=plan))
    assert [options.gpu_layers for options in tried] == [(layers,)]
