"""GpuDevice: the GPUs that the loaded llama.cpp can use, as ggml reports them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowtide.models.errors import NoGpu
from lowtide.models.gguf.llama_cpp import llama_library

_P = ctypes.c_void_p
_GPU, _INTEGRATED_GPU = 1, 2
"""ggml's numbers of device types."""
_NO_GPUS = frozenset({"CPU", "BLAS", "RPC"})
"""Backends that have no GPU of this machine."""
_APPLE = ("MTL", "Metal")
_SOFTWARE = ("llvmpipe", "lavapipe", "swiftshader")
"""What the descriptions of drivers that compute on the processor hold, in lower case."""

HOW_TO_GET_ONE = (
    "build it with one, CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir --no-deps "
    "llama-cpp-python (or GGML_VULKAN, GGML_HIP, GGML_METAL, GGML_SYCL)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """A device that can take layers.

    `shares_memory` is true where its memory is the machine's main memory.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    shares_memory: bool = False


def gpu_backends() -> tuple[str, ...]:
    """Return the GPU backends that llama.cpp was built with."""
    count = _function("ggml_backend_reg_count", ctypes.c_size_t)()
    at = _function("ggml_backend_reg_get", _P, ctypes.c_size_t)
    name = _function("ggml_backend_reg_name", ctypes.c_char_p, _P)
    names = [name(at(i)).decode() for i in range(count)]
    return tuple(name for name in names if name not in _NO_GPUS)


def read_gpu_devices() -> tuple[GpuDevice, ...]:
    """Return the devices that llama.cpp would use: integrated ones only where there are no others.

    The first call makes GPU drivers allocate memory in this process.
    """
    count = _function("ggml_backend_dev_count", ctypes.c_size_t)()
    at = _function("ggml_backend_dev_get", _P, ctypes.c_size_t)
    kind = _function("ggml_backend_dev_type", ctypes.c_int, _P)
    handles = [at(i) for i in range(count)]
    for device_type in (_GPU, _INTEGRATED_GPU):
        devices = tuple(_device(handle) for handle in handles if kind(handle) == device_type)
        if devices:
            return devices
    return ()


def require_gpus(option: str) -> tuple[GpuDevice, ...]:
    """Return the devices for a command-line option; raise `NoGpu` with how to get one where there is none."""
    devices = read_gpu_devices()
    if devices:
        return devices
    backends = gpu_backends()
    if backends:
        raise NoGpu(
            f"{option} needs a GPU, but llama.cpp's backend {', '.join(backends)} finds none: check its "
            f"driver, or leave {option} out"
        )
    raise NoGpu(
        f"{option} needs a GPU, but the llama.cpp of {llama_library().file} is built for the CPU only: "
        f"{HOW_TO_GET_ONE}, or leave {option} out"
    )


def device_address(name: str) -> int:
    """Return ggml's handle of a device."""
    handle: int | None = _function("ggml_backend_dev_by_name", _P, ctypes.c_char_p)(name.encode())
    if handle is None:
        raise NoGpu(f"the device {name} is no longer there: plan again")
    return handle


def cpu_buffer_type() -> int:
    """Return ggml's handle of the buffer type of main memory."""
    handle: int = _function("ggml_backend_cpu_buffer_type", _P)()
    return handle


def _device(handle: int) -> GpuDevice:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _function("ggml_backend_dev_memory", None, _P, _P, _P)(
        handle, ctypes.addressof(free), ctypes.addressof(total)
    )
    kind = _function("ggml_backend_dev_type", ctypes.c_int, _P)(handle)
    name, description = (
        _function(f"ggml_backend_dev_{what}", ctypes.c_char_p, _P)(handle).decode(errors="replace")
        for what in ("name", "description")
    )
    return GpuDevice(
        name=name,
        description=description.strip(),
        total_bytes=total.value,
        free_bytes=free.value,
        shares_memory=kind == _INTEGRATED_GPU
        or name.startswith(_APPLE)
        or any(software in description.lower() for software in _SOFTWARE),
    )


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)(llama_library().address(name))
