"""GpuPlan: who gets which bytes of one device, as a value. `gpu_layers` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.memory.owners import CACHE
from lowtide.memory.plan_row import PlanRow
from lowtide.models.gpu_device import GpuDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """A device's rows. `num_layers` counts as llama.cpp does: the output's matrix is one."""

    device: GpuDevice
    budget_bytes: int
    num_layers: int
    rows: tuple[PlanRow, ...]

    @property
    def total_bytes(self) -> int:
        """What is planned on the device: the sum of the rows."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether that is inside what the device may hold."""
        return self.total_bytes <= self.budget_bytes

    @property
    def cache_bytes(self) -> int:
        """The part of the KV cache that lies here."""
        return sum(row.num_bytes for row in self.rows if row.owner == CACHE)

    def to_dict(self) -> dict[str, Any]:
        """Return the device's part of the plan for JSON."""
        return {
            "name": self.device.name,
            "description": self.device.description,
            "shares_memory": self.device.shares_memory,
            "free_bytes": self.device.free_bytes,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "gpu_layers": self.num_layers,
            "rows": [row.to_dict() for row in self.rows],
            "total_bytes": self.total_bytes,
        }
