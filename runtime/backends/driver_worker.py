"""The process that measures what a GPU's driver takes: it loads a model on the devices and runs passes of each size.

`runtime/backends/driver_memory.py` starts it. It reads a request from standard input and writes its answer to standard
output, each as JSON. A process of its own makes the growth of its memory the driver's, and a driver that crashes ends
no one else.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowtide.attention.bindings.decode import install_guarded_passes
from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.process import read_peak_bytes, read_process_memory
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.buffers import Buffer, bytes_on
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.gpu import GpuDevice, read_gpu_devices
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import DeviceLayers, LoadOptions
from lowtide.models.read_spec import read_spec
from lowtide.models.spec import ModelSpec

PASS_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
"""Drivers compile other kernels for few tokens than for many; verifying drafts has 2 to 8."""
MAPPED_LIBRARY = re.compile(r"(/\S*\.so[\w.]*)$", re.MULTILINE)


def pass_sizes(batch_size: int) -> tuple[int, ...]:
    """Return the numbers of tokens of passes that need kernels of their own, up to a whole batch."""
    return (*(size for size in PASS_SIZES if size < batch_size), batch_size)


def measure(
    path: str, gpu_layers: list[tuple[str, int]], options: dict[str, Any]
) -> dict[str, Any]:
    """Load the model at `path` with `gpu_layers` and run its passes.

    Returns the bytes in the process beyond llama.cpp's buffers and the vocabulary, those on each device that says how
    much is free, beyond llama.cpp's buffers, and the libraries that are loaded.
    """
    spec = read_spec(Path(path))
    install_guarded_passes()
    before = {one.name: one for one in read_gpu_devices()}
    resident_bytes = read_process_memory().resident_bytes
    vocabulary_bytes = _vocabulary_bytes(spec, resident_bytes)
    load = LoadOptions(
        **options,
        threads=1,
        memory_map=False,
        gpu_layers=tuple(DeviceLayers(name, count) for name, count in gpu_layers),
    )
    with guarded_aborts(), contextlib.closing(GgufModel(spec, load)) as model:
        for size in pass_sizes(load.batch_size):
            model.truncate(0)
            model.forward((0,) * size)
        grown_bytes = read_peak_bytes() - resident_bytes
        after = {one.name: one for one in read_gpu_devices()}
        on_devices = {layers.device for layers in load.gpu_layers}
        in_process = _in_process(model.buffers, before, on_devices)
        return {
            "process_bytes": max(grown_bytes - in_process - vocabulary_bytes, 0),
            "device_bytes": dict(_on_devices(model.buffers, before, after, on_devices)),
            "libraries": sorted(set(_mapped_libraries())),
        }


def _vocabulary_bytes(spec: ModelSpec, before_bytes: int) -> int:
    """Return what the vocabulary and the graph take in any process: a line of the plan of its own."""
    with guarded_aborts(), contextlib.closing(SimulatedGguf(spec)) as simulated:
        simulated.hold(256, 1, "f16")
        return max(read_process_memory().resident_bytes - before_bytes, 0)


def _in_process(buffers: tuple[Buffer, ...], devices: dict[str, GpuDevice], used: set[str]) -> int:
    """Return the bytes of llama.cpp's buffers in main memory."""
    elsewhere = {name for name in used if not devices[name].shares_memory}
    return sum(one.num_bytes for one in buffers if one.place not in elsewhere)


def _on_devices(
    buffers: tuple[Buffer, ...],
    before: dict[str, GpuDevice],
    after: dict[str, GpuDevice],
    used: set[str],
) -> Iterator[tuple[str, int]]:
    """Yield what each device has less beyond the buffers; not for one whose driver does not count what is free."""
    for name in sorted(used):
        planned = sum(bytes_on(buffers, name).values())
        taken = before[name].free_bytes - after[name].free_bytes
        if before[name].shares_memory:
            yield name, 0  # it is in the process
        elif taken >= planned:
            yield name, taken - planned


def _mapped_libraries() -> Iterator[str]:
    """Yield the libraries in this process, among them the driver's: a new version is another file."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        yield from (path for path in MAPPED_LIBRARY.findall(text) if Path(path).is_file())


def main() -> None:
    """Answer the request on standard input."""
    request = json.loads(sys.stdin.readline())
    llama_library()
    try:
        reply = measure(**request)
    except LowtideError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), flush=True)
