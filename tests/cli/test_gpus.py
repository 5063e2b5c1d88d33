"""-ngl and --gpu-memory without a GPU, and with a simulated one, on which nothing is loaded."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result
from gpus import gpu
from processes import run_lowtide

from lowtide import FakeModel, Runtime
from lowtide.cli.main import main
from lowtide.models.errors import BadOption
from lowtide.models.gguf.gpu import GpuDevice, read_gpu_devices


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def planned(*arguments: str) -> dict[str, object]:
    done = invoke("plan", "smollm2", "--memory", "4GiB", "-c", "2048", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    plan: dict[str, object] = json.loads(done.stdout)
    return plan


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> GpuDevice:
    device = gpu("GPU0", 150)
    monkeypatch.setattr("lowtide.models.gguf.gpu.read_gpu_devices", lambda: (device,))
    return device


@pytest.mark.parametrize("command", ["run", "chat", "plan", "profile"])
@pytest.mark.parametrize("option", [("-ngl", "1"), ("-ngl", "auto"), ("--gpu-memory", "1GiB")])
def test_without_a_gpu(command: str, option: tuple[str, str]) -> None:
    if read_gpu_devices():
        pytest.skip("this llama.cpp has a device")
    done = CliRunner().invoke(main, [command, *option, "--memory", "1GiB"], input="Hi")
    assert done.exit_code == 2 and done.stdout == ""
    assert "needs a GPU" in done.stderr


@pytest.mark.real
def test_zero_layers_need_no_gpu() -> None:
    done = run_lowtide("run", "-ngl", "0", "-n", "2", "--memory", "1GiB", "-p", "Hi")
    assert done.code == 0 and done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-ngl", "many"), "--gpu-layers is 'many'; it must be a number of layers or auto"),
        (("-ngl=-1",), "--gpu-layers is '-1'"),
        (("-ngl", "0", "--gpu-memory", "1G"), "leave --gpu-memory out"),
        (("-ngl", "2", "--gpu-memory", "lots"), "'lots' is not a size"),
        (("--gpu-memory", "8GiB"), "GPU0 has 150.0 MiB free: ask for less"),
    ],
)
def test_wrong_input(one_gpu: GpuDevice, arguments: tuple[str, ...], message: str) -> None:
    done = invoke("plan", "smollm2", *arguments)
    assert done.exit_code == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_with_a_device(one_gpu: GpuDevice) -> None:
    plan = planned("-ngl", "auto")
    (device,) = plan["gpus"]  # type: ignore[misc]
    assert 0 < plan["gpu_layers"] == device["gpu_layers"] <= 31  # type: ignore[operator]
    assert device["total_bytes"] <= device["budget_bytes"] == one_gpu.free_bytes
    assert planned("--gpu-memory", "100%")["gpus"] == plan["gpus"]
    assert planned("-ngl", "3")["gpu_layers"] == 3
    assert planned()["gpus"] == []
    printed = invoke("plan", "smollm2", "--memory", "4GiB", "-c", "2048", "-ngl", "auto").stdout
    assert "GPU0: Simulated" in printed and "total on GPU0" in printed


def test_the_cache_of_lowtides_attention_stays_in_ram(one_gpu: GpuDevice) -> None:
    plan = planned("-ngl", "5", "--attention", "dense")
    rows = {row["component"]: row for row in plan["gpus"][0]["rows"]}  # type: ignore[index]
    assert rows["KV cache"]["bytes"] == 0 and "stays in RAM" in rows["KV cache"]["why"]


def test_layers_that_do_not_fit_are_refused(one_gpu: GpuDevice) -> None:
    done = invoke("plan", "smollm2", "--memory", "4GiB", "-c", "8192", "-ngl", "31")
    assert done.exit_code == 2
    assert "31 layers on GPU0 needs at least" in done.stderr and "auto takes" in done.stderr


def test_doctor_lists_devices(one_gpu: GpuDevice) -> None:
    assert "GPU0                 Simulated, 150.0 MiB free of 300.0 MiB" in invoke("doctor").stdout


def test_a_model_object_has_no_layers_for_a_gpu(one_gpu: GpuDevice) -> None:
    with pytest.raises(BadOption, match="gpu_layers"):
        Runtime.open(FakeModel(), gpu_layers=1)
