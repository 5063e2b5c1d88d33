"""DriverMemory: what a GPU's driver takes beside the buffers that llama.cpp asks for, measured or estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowtide.memory.units import MIB

ESTIMATED_PROCESS_BYTES = 192 * MIB
"""Compiled kernels and the driver's own lists in this process, where they could not be measured: with Mesa's software
driver, which compiles kernels to code of the processor, 182 MiB were measured for a small model."""
ESTIMATED_DEVICE_BYTES = 64 * MIB
"""The driver's own memory on a device where it was not measured, such as the workspace of cuBLAS."""
ESTIMATED_SHARE = 10
"""The same as a part of the device's memory, a tenth, where no limit for the device was set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverMemory:
    """`process_bytes` are in this process: kernels that the driver compiled, staging buffers, its libraries' data.

    `device_bytes` are on each device by its name, beyond llama.cpp's buffers; a device that is missing did not say it.
    """

    process_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    is_measured: bool = True


ESTIMATED = DriverMemory(process_bytes=ESTIMATED_PROCESS_BYTES, is_measured=False)
LEFT_OUT = DriverMemory(process_bytes=0, is_measured=False)
"""For a plan that only says how many layers could go to a device, so that it can be measured with these."""
