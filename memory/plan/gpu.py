"""GpuBudget: how many layers are wanted on which devices, and what each may hold. Knows no model.

GpuLayers: which layers go to which device, and what they take there, by arithmetic alone.

llama.cpp counts from the end: the output's matrix first, then the last layer. Those that leave the
processor are a run of layers, of which the first device takes as many as fit, the next ones the rest.

GpuPlan: who gets which bytes of one device, as a value. `gpu_layers` makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan import line as components
from lowtide.memory.plan.line import CACHE, PlanCandidate, PlanLine
from lowtide.memory.units import MIB, OverBudget, format_bytes, parse_size
from lowtide.models.errors import BadOption
from lowtide.models.gguf.gpu import GpuDevice
from lowtide.models.spec import ModelSpec

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """A device's rows. `num_layers` counts as llama.cpp does: the output's matrix is one."""

    device: GpuDevice
    budget_bytes: int
    num_layers: int
    rows: tuple[PlanLine, ...]

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
        return sum(row.num_bytes for row in self.rows if row.component == CACHE)

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


BACKEND_BYTES = 64 * MIB
"""What a backend takes for itself beside llama.cpp's buffers, such as cuBLAS's workspace: an estimate."""
PADDING_BYTES = 64 << 10
"""A device aligns each of a layer's tensors, and pads some to whole blocks of 512 elements."""
OUTPUT = "output"
EMBEDDING = "token_embd"


@dataclass(frozen=True, slots=True)
class _Need:
    """What one of llama.cpp's layers needs on its device."""

    weight_bytes: int
    cache_bytes: int


class GpuLayers:
    """Places one model's layers, for choices of its context.

    Raises `BadOption` where the layers' sizes are not known.
    """

    def __init__(self, spec: ModelSpec, budget: GpuBudget) -> None:
        if len([g for g in spec.weight_groups if g.layer is not None]) != spec.num_layers:
            raise BadOption(
                f"gpu_layers is wanted, and the sizes of {spec.name}'s layers are not known: leave it out"
            )
        self._spec = spec
        self._budget = budget
        self._most = spec.num_layers + 1

    def place(self, choice: PlanCandidate) -> tuple[GpuPlan, ...]:
        """Return the plan of each device that gets layers.

        Where so many as are stated do not fit, the last device's plan is beyond its budget.
        """
        needs = self._needs(choice)
        stated = self._budget.layers
        if stated is not None:
            return self._placed(min(stated, self._most), needs, choice)
        low, high = 0, self._most + 1
        while high - low > 1:
            middle = (low + high) // 2
            if all(plan.fits for plan in self._placed(middle, needs, choice)):
                low = middle
            else:
                high = middle
        return self._placed(low, needs, choice)

    @property
    def loading_bytes(self) -> int:
        """What passes through the process's memory at once while a device is filled: a tensor at most."""
        return max(group.num_bytes for group in self._spec.weight_groups)

    def weight_bytes_left(self, plans: tuple[GpuPlan, ...]) -> int:
        """Return what of the weights stays with the processor: what no device holds, and the embedding."""
        spec = self._spec
        count = sum(plan.num_layers for plan in plans)
        gone = sum(self._weight_bytes(i) for i in range(self._most - count, spec.num_layers))
        if count and not self._is_tied:
            gone += self._weight_bytes(spec.num_layers)
        return spec.weight_bytes - gone

    def _placed(self, count: int, needs: list[_Need], choice: PlanCandidate) -> tuple[GpuPlan, ...]:
        """Place the last `count` of llama.cpp's layers, device by device."""
        plans = []
        first, devices = self._most - count, self._budget.devices
        for i, (device, budget_bytes) in enumerate(
            zip(devices, self._budget.device_bytes, strict=True)
        ):
            last = first
            room = budget_bytes - sum(row.num_bytes for row in self._common_rows(choice))
            while last < self._most and (
                i == len(devices) - 1 or needs[last].weight_bytes + needs[last].cache_bytes <= room
            ):
                room -= needs[last].weight_bytes + needs[last].cache_bytes
                last += 1
            if last > first:
                plans.append(self._plan(device, budget_bytes, needs[first:last], choice))
            first = last
        return tuple(plans)

    def _plan(
        self,
        device: GpuDevice,
        budget_bytes: int,
        needs: list[_Need],
        choice: PlanCandidate,
    ) -> GpuPlan:
        cache = (
            f"{choice.context:,} tokens of {choice.kv_type}, of these layers"
            if self._budget.holds_cache
            else "stays in RAM, with the attention"
        )
        return GpuPlan(
            device=device,
            budget_bytes=budget_bytes,
            num_layers=len(needs),
            rows=(
                PlanLine(
                    components.WEIGHTS,
                    sum(need.weight_bytes for need in needs),
                    f"{self._spec.quantisation}, {len(needs)} of {self._most} layers, the output's "
                    "matrix counts as one",
                ),
                PlanLine(components.CACHE, sum(need.cache_bytes for need in needs), cache),
                *self._common_rows(choice),
            ),
        )

    def _common_rows(self, choice: PlanCandidate) -> tuple[PlanLine, ...]:
        """What a device needs whichever layers it has: upper bounds."""
        spec = self._spec
        compute = footprint.compute_bytes(spec, choice.context, choice.batch_size, choice.kv_type)
        compute += 4 * spec.vocabulary.num_tokens  # a row of logits
        backend = BACKEND_BYTES
        if not self._attention_can_stay:
            compute += self._largest_cache(choice, choice.kv_type)
        elif self._budget.holds_cache and choice.kv_type != "f16":
            backend += self._largest_cache(choice, "f16")
        return (
            PlanLine(components.COMPUTE, compute, f"{choice.batch_size} rows a pass, at most"),
            PlanLine(components.RESERVE, backend, "the backend's own, an estimate"),
        )

    def _largest_cache(self, choice: PlanCandidate, kv_type: str) -> int:
        """A layer's cache at most, of which the device makes a copy."""
        layers = range(self._spec.num_layers)
        return max(
            footprint.kv_layer_bytes(self._spec, layer, choice.context, kv_type) for layer in layers
        )

    @property
    def _attention_can_stay(self) -> bool:
        """Whether the matrix behind attention is known, if attention is to be where the cache is."""
        layers = (group for group in self._spec.weight_groups if group.layer is not None)
        return self._budget.holds_cache or all(group.projection_bytes for group in layers)

    def _needs(self, choice: PlanCandidate) -> list[_Need]:
        spec = self._spec
        layers = [
            _Need(self._weight_bytes(layer) + PADDING_BYTES, self._cache_bytes(layer, choice))
            for layer in range(spec.num_layers)
        ]
        return [*layers, _Need(self._weight_bytes(spec.num_layers) + PADDING_BYTES, 0)]

    def _cache_bytes(self, layer: int, choice: PlanCandidate) -> int:
        if not self._budget.holds_cache:
            return 0
        return footprint.kv_layer_bytes(self._spec, layer, choice.context, choice.kv_type)

    def _weight_bytes(self, layer: int) -> int:
        """Bytes that leave the processor with a layer; the one after the last is the output.

        Attention that stays takes the matrix behind it along: llama.cpp computes it where that lies.
        """
        groups = self._spec.weight_groups
        if layer < self._spec.num_layers:
            group = groups[layer]
            stays = 0 if self._budget.holds_cache else group.projection_bytes
            return group.num_bytes - stays
        wanted = (OUTPUT, EMBEDDING) if self._is_tied else (OUTPUT,)
        return sum(g.num_bytes for g in groups if g.layer is None and g.name.startswith(wanted))

    @property
    def _is_tied(self) -> bool:
        """Whether the embedding is the output's matrix too: then the device gets a copy of it."""
        return all(group.name != f"{OUTPUT}.weight" for group in self._spec.weight_groups)


def require_gpu_fit(plans: Sequence[GpuPlan], spec: ModelSpec, budget: GpuBudget | None) -> None:
    """Raise `OverBudget` for the device that so many layers do not fit on, with how many would."""
    too_small = next((plan for plan in plans if not plan.fits), None)
    if too_small is None or budget is None:
        return
    count = sum(plan.num_layers for plan in plans)
    raise OverBudget(
        f"{spec.name} with {count} layers on {too_small.device.name}",
        too_small.total_bytes,
        too_small.budget_bytes,
        "ask for fewer --gpu-layers (auto takes as many as fit), shorten --context, or raise --gpu-memory",
    )
