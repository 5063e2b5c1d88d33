"""MemoryPlan: who gets which bytes, as a value. Knows no model; `planner` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.memory.budget import Budget
from lowtide.memory.plan.attention import NO_ATTENTION_MEMORY, AttentionMemory, FilterPrefill
from lowtide.memory.plan.gpu import GpuBudget, GpuPlan
from lowtide.memory.plan.line import PlanLine
from lowtide.memory.plan.speculation import SpeculationConfig
from lowtide.memory.units import format_bytes
from lowtide.models.errors import BadOption

KV_TYPES = ("f16", "q8_0", "q4_0", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the user fixed; None leaves the choice to the plan."""

    context: int | None = None
    kv_type: str | None = None
    batch_size: int | None = None
    threads: int = 2
    attention_threads: int = 0
    """Threads of our own attention kernels; 0 where attention is llama.cpp's."""
    attention: AttentionMemory = NO_ATTENTION_MEMORY
    """Memory of the attention policy."""
    profiled: bool = False
    """Whether a profiler watches."""
    prefix_bytes: int = 0
    """What the prefix cache may hold, where there is room."""
    speculation: SpeculationConfig | None = None
    """Drafts to verify, where there is room; None where nothing is drafted."""
    compared_tokens: int = 0
    """Distributions over the vocabulary that a measurement keeps."""
    packed: bool = False
    """Whether the weights are a packed copy, whose products our kernels compute."""
    gpu: GpuBudget | None = None
    """Which devices may take layers, and how much of each; None where none is to."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise BadOption(f"context is {self.context}, 1 or more tokens are wanted")
        if self.kv_type is not None and self.kv_type not in KV_TYPES:
            raise BadOption(f"kv_type is {self.kv_type!r}, one of {', '.join(KV_TYPES)} is wanted")
        if self.batch_size is not None and not 1 <= self.batch_size <= 4096:
            raise BadOption(f"batch_size is {self.batch_size}, 1 to 4096 are wanted")

    @property
    def filter_prefill(self) -> FilterPrefill | None:
        """The prefill that filters prompts; None if all layers read every prompt whole."""
        return self.attention.filter_prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessBaseline:
    """What the plan must know of where it runs.

    `interpreter_bytes` is what the process needs before any model; `processor` as `platform.machine()`.
    `kv_on_demand` says whether cells without a token take no memory, `can_stream_weights` whether mapped
    weights can be given back between the layers. `vocabulary_bytes`, where it was measured, replaces the
    formula; `tolerance_bytes` is how much the measured figures may differ from one run to the next.
    `repacks` says whether llama.cpp may copy weights into layouts of its own.
    Before the weights are there, `vocabulary_loading_bytes` more than its own are needed for a moment.
    """

    interpreter_bytes: int
    processor: str
    kv_on_demand: bool = False
    can_stream_weights: bool = False
    repacks: bool = True
    vocabulary_bytes: int | None = None
    vocabulary_loading_bytes: int = 0
    tolerance_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Who gets which bytes. `downgrades` says, in words, what the budget cost.

    `kv_tokens` is how many of the context's tokens the KV cache's row holds; beyond them the cache grows
    while the budget has room. Of the layers' weights `resident_layers` stay resident and the others are read
    again for every pass; None where all weights stay. `rows` are the process's own;
    `gpus` has the rows of each device that takes layers, inside a budget of its own. `verify_batch` is how
    many rows a verification of drafts may have; 0 where there is none.
    """

    budget: Budget
    rows: tuple[PlanLine, ...]
    lower_bound_bytes: int
    context: int
    batch_size: int
    kv_type: str
    kv_tokens: int
    cache_tokens: int
    cache_filter_pass: bool
    memory_map: bool
    resident_layers: int | None
    downgrades: tuple[str, ...]
    gpus: tuple[GpuPlan, ...] = ()
    verify_batch: int = 0

    @property
    def total_bytes(self) -> int:
        """The planned peak: the sum of the rows."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the planned peak is inside the budget, and each device's bytes are inside its own."""
        return self.total_bytes <= self.budget.num_bytes and all(gpu.fits for gpu in self.gpus)

    @property
    def gpu_layers(self) -> int:
        """How many layers the devices have, as llama.cpp counts: the output's matrix is one."""
        return sum(gpu.num_layers for gpu in self.gpus)

    @property
    def gpu_cache_bytes(self) -> int:
        """The part of the KV cache that devices hold."""
        return sum(gpu.cache_bytes for gpu in self.gpus)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON: sizes in bytes, context in tokens."""
        return {
            "budget_bytes": self.budget.num_bytes,
            "budget_source": self.budget.source,
            "lower_bound_bytes": self.lower_bound_bytes,
            "fits": self.fits,
            "rows": [row.to_dict() for row in self.rows],
            "total_bytes": self.total_bytes,
            "context": self.context,
            "batch_size": self.batch_size,
            "kv_type": self.kv_type,
            "kv_tokens": self.kv_tokens,
            "cache_tokens": self.cache_tokens,
            "cache_filter_pass": self.cache_filter_pass,
            "memory_map": self.memory_map,
            "resident_layers": self.resident_layers,
            "downgrades": list(self.downgrades),
            "verify_batch": self.verify_batch,
            "gpu_layers": self.gpu_layers,
            "gpus": [gpu.to_dict() for gpu in self.gpus],
        }

    def __str__(self) -> str:
        width = max(len(row.component) for row in self.rows)

        def line(component: str, num_bytes: int, why: str) -> str:
            return f"{component:<{width}}  {format_bytes(num_bytes):>10}  {why}"

        lines = [line(row.component, row.num_bytes, row.why) for row in self.rows]
        limit = f"of {format_bytes(self.budget.num_bytes)} ({self.budget.source})"
        lines.append(line("planned peak", self.total_bytes, limit))
        for gpu in self.gpus:
            lines.append(f"{gpu.device.name}: {gpu.device.description}")
            lines += [line(row.component, row.num_bytes, row.why) for row in gpu.rows]
            limit = f"of {format_bytes(gpu.budget_bytes)}"
            lines.append(line(f"on {gpu.device.name}", gpu.total_bytes, limit))
        lines += [f"gave up: {step}" for step in self.downgrades]
        return "\n".join(lines)
