"""Imaginary GPUs, for plans."""

from __future__ import annotations

from lowtide.memory.plan.gpu import GpuBudget
from lowtide.memory.units import MIB
from lowtide.models.gguf.gpu import GpuDevice


def gpu(
    name: str = "GPU0", free_mebibytes: float = 1000, *, shares_memory: bool = False
) -> GpuDevice:
    """Return a device of twice as many bytes as are free."""
    free_bytes = int(free_mebibytes * MIB)
    return GpuDevice(
        name=name,
        description="Simulated",
        total_bytes=2 * free_bytes,
        free_bytes=free_bytes,
        shares_memory=shares_memory,
    )


def gpu_budget(
    layers: int | None,
    *devices: GpuDevice,
    memory: str | None = "100%",
    holds_cache: bool = True,
) -> GpuBudget:
    """Return a budget of all that the devices have free."""
    return GpuBudget.from_user(layers, memory, devices or (gpu(),), holds_cache=holds_cache)
