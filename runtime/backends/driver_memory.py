"""What a GPU's driver takes beside llama.cpp's buffers: measured once for a model, its devices and their driver.

Drivers compile kernels when a pass first needs them, which takes tens to hundreds of MiB in the process, and have
memory of their own on the device. A process of its own loads the model there and runs passes of each size
(`driver_worker.py`), before any budget is handed out. What it measured is stored with the files of the driver
(`models/facts/store.py`), and measured again when one of them changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowtide.memory.machine import read_machine
from lowtide.memory.plan.driver import ESTIMATED, DriverMemory
from lowtide.memory.plan.gpu import GpuBudget
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.models.arguments.names import option
from lowtide.models.errors import ForwardError, NoGpu
from lowtide.models.facts.store import Facts
from lowtide.models.gguf.gpu import device_address
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec

WORKER_CODE = "from lowtide.runtime.backends.driver_worker import main; main()"
CONTEXT = 512
"""Tokens of the context of a measurement: kernels do not depend on it."""
MOST_SECONDS = 600
SAFETY_SHARE = 8
"""Measurements differ from run to run by less than an eighth, which is added."""
VARIABLES = ("GGML_", "VK_", "MESA_", "LP_", "CUDA_", "HIP_", "ROCR_", "LD_PRELOAD")
"""Environment variables that begin so may change the driver, or what it takes."""
CACHES = ("MESA_SHADER_CACHE_DIR", "__GL_SHADER_DISK_CACHE_PATH")
"""Where drivers store compiled kernels. A measurement has none: to compile them takes the most memory."""


_not_stored: dict[str, dict[str, Any]] = {}
"""What this process measured, where there is no folder for it or a file that it depends on is new."""


def driver_memory(spec: ModelSpec, plan: MemoryPlan, gpu: GpuBudget) -> DriverMemory:
    """Return what the drivers take for the layers that `plan` puts on devices.

    It is an estimate where it cannot be measured here. Raises `ForwardError` where a pass on the devices fails.
    """
    try:
        for one in plan.gpus:
            device_address(one.device.name)
    except NoGpu:
        return ESTIMATED
    facts = _facts(spec, plan, gpu)
    stored = facts.read() or _not_stored.get(facts.subject)
    if stored is not None and stored["layers"] >= plan.gpu_layers:
        return _of(stored)
    if plan.total_bytes > read_machine().available_bytes:
        return ESTIMATED
    measured = _measured(spec, plan, gpu)
    if measured is None:
        return ESTIMATED
    libraries = [Path(path) for path in measured.pop("libraries")]
    measured["layers"] = plan.gpu_layers
    _not_stored[facts.subject] = measured
    facts.write(measured, _files(spec, libraries))
    return _of(measured)


def _of(values: dict[str, Any]) -> DriverMemory:
    return DriverMemory(
        process_bytes=_with_safety(values["process_bytes"]),
        device_bytes={
            name: _with_safety(num_bytes) for name, num_bytes in values["device_bytes"].items()
        },
    )


def _with_safety(num_bytes: int) -> int:
    return int(num_bytes) + int(num_bytes) // SAFETY_SHARE


def _facts(spec: ModelSpec, plan: MemoryPlan, gpu: GpuBudget) -> Facts:
    """Return the place of what was measured, for all that decides which kernels a driver compiles."""
    library = llama_library()
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(VARIABLES))
    devices = [f"{one.device.name} {one.device.description}" for one in plan.gpus]
    cache = f"{plan.kv_type} {'on the device' if gpu.holds_cache else 'in RAM'}"
    settings = (cache, f"batches of {plan.batch_size}", platform.platform(), *devices, *variables)
    return Facts.about("driver", spec.path, library.file.path, library.system_info, *settings)


def _files(spec: ModelSpec, libraries: list[Path]) -> Iterator[Path]:
    yield from spec.paths
    yield from libraries
    yield llama_library().file.path
    yield Path(__file__)
    yield Path(__file__).with_name("driver_worker.py")


def _measured(spec: ModelSpec, plan: MemoryPlan, gpu: GpuBudget) -> dict[str, Any] | None:
    """Return the worker's answer; None where no process can be started, or the system killed it."""
    names = " and ".join(one.device.name for one in plan.gpus)
    request = {
        "path": str(spec.path.absolute()),
        "gpu_layers": [(one.device.name, one.num_layers) for one in plan.gpus],
        "options": {
            "context": max(CONTEXT, plan.batch_size),
            "batch_size": plan.batch_size,
            "kv_type": plan.kv_type,
            "gpu_attention": gpu.holds_cache,
        },
    }
    advice = f"update the driver, or leave {option('gpu_layers')} out"
    with tempfile.TemporaryDirectory(prefix="lowtide-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-c", WORKER_CODE],
                input=json.dumps(request) + "\n",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=MOST_SECONDS,
                env={**os.environ, **dict.fromkeys(CACHES, folder)},
            )
        except OSError:
            return None
        except subprocess.TimeoutExpired:
            raise ForwardError(
                f"a first pass on {names} took more than {MOST_SECONDS} s: {advice}"
            ) from None
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode < 0:
        reason = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
        raise ForwardError(f"a first pass on {names} ended its process ({reason}): {advice}")
    answer: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError):
        answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ForwardError(f"a first pass on {names} failed: {answer['error']}")
    return answer or None
