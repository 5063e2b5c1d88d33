"""Devices as ggml reports them; its functions are replaced one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from lowtide.models.errors import NoGpu
from lowtide.models.gguf import gpu as gguf_gpu
from lowtide.models.gguf.gpu import GpuDevice, gpu_backends, read_gpu_devices, require_gpus

CPU, GPU, INTEGRATED = 0, 1, 2


@pytest.fixture
def ggml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make ggml report `devices` (name and type) and `backends`."""

    def report(
        *devices: tuple[str, int],
        backends: tuple[str, ...] = ("CPU",),
        description: bytes = b"A device ",
    ) -> None:
        def memory(handle: int, free: int, total: int) -> None:
            ctypes.c_size_t.from_address(free).value = 100 * handle
            ctypes.c_size_t.from_address(total).value = 200 * handle

        functions: dict[str, Callable[..., Any]] = {
            "ggml_backend_reg_count": lambda: len(backends),
            "ggml_backend_reg_get": lambda i: i,
            "ggml_backend_reg_name": lambda i: backends[i].encode(),
            "ggml_backend_dev_count": lambda: len(devices),
            "ggml_backend_dev_get": lambda i: i + 1,
            "ggml_backend_dev_type": lambda handle: devices[handle - 1][1],
            "ggml_backend_dev_name": lambda handle: devices[handle - 1][0].encode(),
            "ggml_backend_dev_description": lambda handle: description,
            "ggml_backend_dev_memory": memory,
        }
        monkeypatch.setattr(gguf_gpu, "_function", lambda name, *_types: functions[name])

    return report


def test_the_real_devices_can_be_read() -> None:
    for device in read_gpu_devices():
        assert device.name and 0 <= device.free_bytes <= device.total_bytes
    assert "CPU" not in gpu_backends()
    assert gguf_gpu.cpu_buffer_type()


def test_integrated_devices_are_used_only_without_others(ggml: Callable[..., None]) -> None:
    ggml(("CPU", CPU), ("CUDA0", GPU), ("Vulkan0", INTEGRATED), ("MTL0", GPU))
    first, apple = read_gpu_devices()
    assert first == GpuDevice(
        name="CUDA0", description="A device", total_bytes=400, free_bytes=200, shares_memory=False
    )
    assert apple.name == "MTL0" and apple.shares_memory
    ggml(("CPU", CPU), ("Vulkan0", INTEGRATED))
    assert [device.shares_memory for device in read_gpu_devices()] == [True]


@pytest.mark.parametrize(
    "description", [b"llvmpipe (LLVM 15.0.6, 256 bits)", b"SwiftShader Device (LLVM 10.0.0)"]
)
def test_a_device_of_software_shares_the_machines_memory(
    ggml: Callable[..., None], description: bytes
) -> None:
    ggml(("CPU", CPU), ("Vulkan0", GPU), description=description)
    assert [device.shares_memory for device in read_gpu_devices()] == [True]


def test_no_backend_is_an_error_that_says_how_to_get_one(ggml: Callable[..., None]) -> None:
    ggml(("CPU", CPU))
    with pytest.raises(NoGpu, match=r"--gpu-memory needs a GPU.*CMAKE_ARGS=-DGGML_CUDA=on pip"):
        require_gpus("--gpu-memory")
    ggml(("CPU", CPU), backends=("CPU", "CUDA"))
    with pytest.raises(NoGpu, match="backend CUDA finds none"):
        require_gpus("--gpu-layers")


def test_a_device_that_is_gone() -> None:
    with pytest.raises(NoGpu, match="CUDA77 is no longer there"):
        gguf_gpu.device_address("CUDA77")
