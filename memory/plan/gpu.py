"""GPU memory: which layers go to which device (`GpuLayers`), within which budget, and the resulting plan.

llama.cpp counts layers from the end: the output matrix first, then the last layer. `--gpu-layers N` moves
the last N of them. The first device takes as many as fit, the next devices take the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowtide.memory.plan import estimates
from lowtide.memory.plan import line as components
from lowtide.memory.plan.driver import (
    ESTIMATED,
    ESTIMATED_DEVICE_BYTES,
    ESTIMATED_SHARE,
    DriverMemory,
)
from lowtide.memory.plan.line import CACHE, PlanCandidate, PlanLine
from lowtide.memory.units import GIB, OverBudget, format_bytes, parse_size
from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import MOST, as_whole, shown
from lowtide.models.errors import BadOption
from lowtide.models.gguf.gpu import GpuDevice
from lowtide.models.spec import ModelSpec

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBudget:
    """How many layers go to the GPUs, and how many bytes each may hold.

    `layers` counts like llama.cpp, the output matrix first and then the last layer; None means as many as
    fit. `device_bytes` is the limit of each of `devices`, in the same order. `holds_cache` says whether the
    KV cache of these layers, and their attention, is on the device too.
    """

    layers: int | None
    devices: tuple[GpuDevice, ...]
    device_bytes: tuple[int, ...]
    holds_cache: bool
    is_limited: bool = False
    """Whether the user set the limit of the devices; without, it is all that they have free."""
    driver: DriverMemory = ESTIMATED
    """What the drivers take beside llama.cpp's buffers."""

    @classmethod
    def from_user(
        cls,
        layers: int | None,
        memory: str | int | None,
        devices: Sequence[GpuDevice],
        *,
        holds_cache: bool,
    ) -> GpuBudget:
        """Return the budget that the user asked for, or each device's free memory.

        A percentage refers to the free memory. Raises `BadSize` if `memory` is not a size, `BadOption` if a
        device has less than that.
        """
        return cls(
            layers=layers,
            devices=tuple(devices),
            device_bytes=tuple(_device_bytes(memory, device) for device in devices),
            holds_cache=holds_cache,
            is_limited=memory is not None,
        )

    def reserve(self, device: GpuDevice) -> tuple[int, str]:
        """Return the bytes of a device that the driver takes beside llama.cpp's buffers, and how that is known."""
        if device.shares_memory:
            return 0, "the driver's own memory is in the process"
        measured = self.driver.device_bytes.get(device.name)
        if measured is not None:
            return measured, "measured: what the driver takes beside the buffers"
        share = 0 if self.is_limited else device.free_bytes // ESTIMATED_SHARE
        return max(ESTIMATED_DEVICE_BYTES, share), "estimate of the driver's own memory"


def parse_gpu_layers(text: str | int | None) -> int | None:
    """Return the number of layers, None for "auto"; raises `BadOption` for anything else."""
    if text is None or (isinstance(text, str) and text.strip().lower() == AUTO):
        return None
    layers = as_whole(text)
    if layers is None or not 0 <= layers <= MOST:
        raise BadOption(
            f"{option('gpu_layers')} is {shown(text)}; it must be a number of layers or {AUTO}"
        )
    return layers


def _device_bytes(memory: str | int | None, device: GpuDevice) -> int:
    if memory is None:
        return device.free_bytes
    num_bytes = parse_size(memory, whole_bytes=device.free_bytes)
    if num_bytes > device.free_bytes:
        raise BadOption(
            f"{option('gpu_memory')} is {format_bytes(num_bytes)}, but {device.name} has "
            f"{format_bytes(device.free_bytes)} free: ask for less"
        )
    return num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """The plan of one device. `num_layers` counts the output matrix as a layer, like llama.cpp."""

    device: GpuDevice
    budget_bytes: int
    num_layers: int
    rows: tuple[PlanLine, ...]

    @property
    def total_bytes(self) -> int:
        """The planned bytes on the device: the sum of its lines."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the planned bytes fit the device's budget."""
        return self.total_bytes <= self.budget_bytes

    @property
    def cache_bytes(self) -> int:
        """The bytes of the KV cache on this device."""
        return sum(row.num_bytes for row in self.rows if row.component == CACHE)

    def second_context_bytes(self, share: float, logits_bytes: int) -> int:
        """Return what a context for a batch takes on the device, with this share of the planned context's slots.

        It has a compute buffer of its own, in which the logits of a pass lie.
        """
        compute = sum(row.num_bytes for row in self.rows if row.component == components.COMPUTE)
        return math.ceil(self.cache_bytes * share) + compute + logits_bytes

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


PADDING_BYTES = 64 << 10
"""Room per layer and per compute buffer: a device aligns each tensor, and pads some to blocks of 512 elements."""
OUTPUT = "output"
EMBEDDING = "token_embd"


@dataclass(frozen=True, slots=True)
class _Need:
    """The bytes that one layer needs on its device."""

    weight_bytes: int
    cache_bytes: int


class GpuLayers:
    """Assigns the layers of one model to devices, for a candidate of the planner.

    Raises `BadOption` if the sizes of the layers are unknown.
    """

    def __init__(self, spec: ModelSpec, budget: GpuBudget) -> None:
        if len([g for g in spec.weight_groups if g.layer is not None]) != spec.num_layers:
            raise BadOption(
                f"the sizes of {spec.name}'s layers are unknown, so none can go to a GPU: leave gpu_layers out"
            )
        self._spec = spec
        self._budget = budget
        self._max_layers = spec.num_layers + 1

    def place(self, candidate: PlanCandidate) -> tuple[GpuPlan, ...]:
        """Return the plan of each device that gets layers.

        If the requested number of layers does not fit, the last device's plan exceeds its budget.
        """
        needs = self._needs(candidate)
        requested = self._budget.layers
        if requested is not None:
            return self._placed(min(requested, self._max_layers), needs, candidate)
        low, high = 0, self._max_layers + 1
        while high - low > 1:
            middle = (low + high) // 2
            if all(plan.fits for plan in self._placed(middle, needs, candidate)):
                low = middle
            else:
                high = middle
        return self._placed(low, needs, candidate)

    def more_layers(self, candidate: PlanCandidate) -> dict[str, int]:
        """Return how many more layers would fit with another GiB on each device that has memory of its own."""
        budget, now = self._budget, sum(plan.num_layers for plan in self.place(candidate))
        more = {}
        for i, device in enumerate(budget.devices):
            if device.shares_memory:
                continue
            sizes = list(budget.device_bytes)
            sizes[i] += GIB
            larger = replace(budget, layers=None, device_bytes=tuple(sizes))
            plans = GpuLayers(self._spec, larger).place(candidate)
            more[device.name] = max(sum(plan.num_layers for plan in plans) - now, 0)
        return more

    @property
    def loading_bytes(self) -> int:
        """Return the largest weight group: copying to a device holds at most one tensor in RAM.

        A measurement of the driver has loaded the weights, and includes it.
        """
        if self._budget.driver.is_measured:
            return 0
        return max(group.num_bytes for group in self._spec.weight_groups)

    def driver_line(self, plans: tuple[GpuPlan, ...]) -> PlanLine:
        """Return the line of the process for what the drivers of the devices take in it."""
        names = " and ".join(plan.device.name for plan in plans)
        how = "measured" if self._budget.driver.is_measured else "estimate, not measured here"
        why = f"compiled kernels and buffers of {names}'s driver, {how}"
        return PlanLine(components.DRIVER, self._budget.driver.process_bytes, why)

    def weight_bytes_left(self, plans: tuple[GpuPlan, ...]) -> int:
        """Return the bytes of the weights that stay in RAM: layers on no device, and the embedding."""
        spec = self._spec
        count = sum(plan.num_layers for plan in plans)
        moved = sum(self._weight_bytes(i) for i in range(self._max_layers - count, spec.num_layers))
        if count and not self._is_tied:
            moved += self._weight_bytes(spec.num_layers)
        return spec.weight_bytes - moved

    def _placed(
        self, count: int, needs: list[_Need], candidate: PlanCandidate
    ) -> tuple[GpuPlan, ...]:
        """Assign the last `count` layers, device by device."""
        plans = []
        first, devices = self._max_layers - count, self._budget.devices
        for i, (device, budget_bytes) in enumerate(
            zip(devices, self._budget.device_bytes, strict=True)
        ):
            last = first
            common = self._common_lines(candidate, device)
            room = budget_bytes - sum(row.num_bytes for row in common)
            while last < self._max_layers and (
                i == len(devices) - 1 or needs[last].weight_bytes + needs[last].cache_bytes <= room
            ):
                room -= needs[last].weight_bytes + needs[last].cache_bytes
                last += 1
            if last > first:
                plans.append(self._plan(device, budget_bytes, needs[first:last], candidate))
            first = last
        return tuple(plans)

    def _plan(
        self,
        device: GpuDevice,
        budget_bytes: int,
        needs: list[_Need],
        candidate: PlanCandidate,
    ) -> GpuPlan:
        cache = (
            f"{candidate.context:,} tokens of {candidate.kv_type}, for these layers"
            if self._budget.holds_cache
            else "stays in RAM, like the attention"
        )
        return GpuPlan(
            device=device,
            budget_bytes=budget_bytes,
            num_layers=len(needs),
            rows=(
                PlanLine(
                    components.WEIGHTS,
                    sum(need.weight_bytes for need in needs),
                    f"{self._spec.quantisation}, {len(needs)} of {self._max_layers} layers (the output matrix "
                    "counts as one)",
                ),
                PlanLine(components.CACHE, sum(need.cache_bytes for need in needs), cache),
                *self._common_lines(candidate, device),
            ),
        )

    def _common_lines(self, candidate: PlanCandidate, device: GpuDevice) -> tuple[PlanLine, ...]:
        """Return the lines that do not depend on the layers of a device; upper bounds."""
        spec = self._spec
        compute = estimates.compute_bytes(
            spec, candidate.context, candidate.batch_size, candidate.kv_type
        )
        compute += self._logits_bytes(candidate, device) + PADDING_BYTES
        reserve, why = self._budget.reserve(device)
        if not self._attention_can_stay:
            compute += self._largest_cache(candidate, candidate.kv_type)
        elif self._budget.holds_cache and candidate.kv_type != "f16":
            reserve += self._largest_cache(candidate, "f16")
        return (
            PlanLine(
                components.COMPUTE,
                compute,
                f"at most, for batches of {candidate.batch_size} tokens",
            ),
            PlanLine(components.RESERVE, reserve, why),
        )

    def _logits_bytes(self, candidate: PlanCandidate, device: GpuDevice) -> int:
        """Return what the logits of a pass take in the compute buffer of a device.

        Those of drafts on a device that shares the machine's memory are in the process's line for speculation.
        """
        num_rows = 1 if device.shares_memory else max(candidate.speculation.verify_batch, 1)
        return 4 * self._spec.vocabulary.num_tokens * num_rows

    def _largest_cache(self, candidate: PlanCandidate, kv_type: str) -> int:
        """Return the largest KV cache of a layer; the device makes a copy of it."""
        layers = range(self._spec.num_layers)
        return max(
            estimates.kv_layer_bytes(self._spec, layer, candidate.context, kv_type)
            for layer in layers
        )

    @property
    def _attention_can_stay(self) -> bool:
        """Whether attention can stay in RAM with the cache: it takes its output projection along."""
        layers = (group for group in self._spec.weight_groups if group.layer is not None)
        return self._budget.holds_cache or all(group.projection_bytes for group in layers)

    def _needs(self, candidate: PlanCandidate) -> list[_Need]:
        spec = self._spec
        layers = [
            _Need(self._weight_bytes(layer) + PADDING_BYTES, self._cache_bytes(layer, candidate))
            for layer in range(spec.num_layers)
        ]
        return [*layers, _Need(self._weight_bytes(spec.num_layers) + PADDING_BYTES, 0)]

    def _cache_bytes(self, layer: int, candidate: PlanCandidate) -> int:
        if not self._budget.holds_cache:
            return 0
        return estimates.kv_layer_bytes(self._spec, layer, candidate.context, candidate.kv_type)

    def _weight_bytes(self, layer: int) -> int:
        """Return the bytes that a layer moves out of RAM; the layer after the last is the output matrix.

        llama.cpp computes attention where the output projection is. So attention that stays in RAM keeps
        that matrix there.
        """
        groups = self._spec.weight_groups
        if layer < self._spec.num_layers:
            group = groups[layer]
            in_ram = 0 if self._budget.holds_cache else group.projection_bytes
            return group.num_bytes - in_ram
        names = (OUTPUT, EMBEDDING) if self._is_tied else (OUTPUT,)
        return sum(g.num_bytes for g in groups if g.layer is None and g.name.startswith(names))

    @property
    def _is_tied(self) -> bool:
        """Whether the embedding is the output matrix too; the device then gets a copy of it."""
        return all(group.name != f"{OUTPUT}.weight" for group in self._spec.weight_groups)


def require_gpu_fit(plans: Sequence[GpuPlan], spec: ModelSpec, budget: GpuBudget | None) -> None:
    """Raise `OverBudget` for the first device whose layers do not fit."""
    too_small = next((plan for plan in plans if not plan.fits), None)
    if too_small is None or budget is None:
        return
    count = sum(plan.num_layers for plan in plans)
    raise OverBudget(
        f"{spec.name} with {count} layers on {too_small.device.name}",
        too_small.total_bytes,
        too_small.budget_bytes,
        f"ask for fewer {option('gpu_layers')} (auto takes as many as fit), shorten {option('context')}, or "
        f"raise {option('gpu_memory')}",
    )
