"""GpuBudget: how many layers are wanted on which devices, and what each may hold. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.memory.units import format_bytes, parse_size
from lowtide.models.errors import BadOption
from lowtide.models.gpu_device import GpuDevice

DEFAULT_SHARE = 0.9
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBudget:
    """`layers` counts as llama.cpp does, the output's matrix first and then the last layer; None is as many
    as fit.

    Of each of `devices` at most `device_bytes` are taken, in the same order. `holds_cache` says whether
    the KV cache of those layers lies there too, and their attention is computed there.
    """

    layers: int | None
    devices: tuple[GpuDevice, ...]
    device_bytes: tuple[int, ...]
    holds_cache: bool

    @classmethod
    def stated(
        cls,
        layers: int | None,
        memory: str | int | None,
        devices: Sequence[GpuDevice],
        *,
        holds_cache: bool,
    ) -> GpuBudget:
        """Return the budget that the user stated, or 90 % of what each device has free.

        A percentage is of what is free. Raises `BadSize` where `memory` is no size, `BadOption` where it is
        more than a device has.
        """
        return cls(
            layers=layers,
            devices=tuple(devices),
            device_bytes=tuple(_device_bytes(memory, device) for device in devices),
            holds_cache=holds_cache,
        )


def parse_gpu_layers(text: str | int | None) -> int | None:
    """Return how many layers `text` means, None for "auto"; raises `BadOption` where it is neither."""
    if text is None or str(text).strip().lower() == AUTO:
        return None
    try:
        layers = int(text)
    except ValueError:
        layers = -1
    if layers < 0:
        raise BadOption(f"gpu_layers is {text!r}, a number of layers or {AUTO} is wanted")
    return layers


def _device_bytes(memory: str | int | None, device: GpuDevice) -> int:
    if memory is None:
        return int(device.free_bytes * DEFAULT_SHARE)
    num_bytes = parse_size(memory, whole_bytes=device.free_bytes)
    if num_bytes > device.free_bytes:
        raise BadOption(
            f"gpu_memory is {format_bytes(num_bytes)}, {device.name} has "
            f"{format_bytes(device.free_bytes)} free: ask for less"
        )
    return num_bytes
