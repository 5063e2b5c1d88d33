"""MemoryPlan: who gets which bytes, as a value. Knows no model; `planner` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.memory.budget import Budget
from lowtide.memory.plan.attention import FirstPass, KeyStates
from lowtide.memory.plan.estimates import KeyGroups
from lowtide.memory.plan.gpu import GpuBudget, GpuPlan
from lowtide.memory.plan.line import PlanRow
from lowtide.memory.plan.speculation import SpeculationWish
from lowtide.memory.units import format_bytes
from lowtide.models.errors import BadOption

KV_TYPES = ("f16", "q8_0", "q4_0", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user fixed; None leaves the choice to the plan."""

    context: int | None = None
    kv_type: str | None = None
    max_rows: int | None = None
    threads: int = 2
    attention_threads: int = 0
    """Threads of our own attention kernels; 0 where attention is llama.cpp's."""
    selection_layers: int = 0
    """How many layers choose keys for the others."""
    first_pass: FirstPass | None = None
    key_groups: KeyGroups | None = None
    key_states: KeyStates | None = None
    """What reads long prompts whole, so that the other layers read less; None where all of them do."""
    profiled: bool = False
    """Whether a profiler watches."""
    prefix_bytes: int = 0
    """What the prefix cache may hold, where there is room."""
    speculation: SpeculationWish | None = None
    """Drafts to verify, where there is room; None where nothing is drafted."""
    compared_rows: int = 0
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
        if self.max_rows is not None and not 1 <= self.max_rows <= 4096:
            raise BadOption(f"max_rows is {self.max_rows}, 1 to 4096 are wanted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the plan must know of where it runs.

    `interpreter_bytes` is what the process needs before any model; `processor` as `platform.machine()`.
    `kv_follows_use` says whether cells without a token take no memory, `can_stream_weights` whether mapped
    weights can be given back between the layers. `vocabulary_bytes`, where it was measured, replaces the
    formula; `tolerance_bytes` is how much the measured figures may differ from one run to the next.
    `repacks` says whether llama.cpp may copy weights into layouts of its own.
    Before the weights are there, `vocabulary_loading_bytes` more than its own are needed for a moment.
    """

    interpreter_bytes: int
    processor: str
    kv_follows_use: bool = False
    can_stream_weights: bool = False
    repacks: bool = True
    vocabulary_bytes: int | None = None
    vocabulary_loading_bytes: int = 0
    tolerance_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Who gets which bytes. `gave_up` says, in words, what the budget cost.

    `kv_tokens` is how many of the context's tokens the KV cache's row holds; beyond them the cache grows
    while the budget has room. Of the layers' weights `kept_layers` stay resident and the others are read
    again for every pass; None where all weights stay. `rows` are the process's own;
    `gpus` has the rows of each device that takes layers, inside a budget of its own. `verified_rows` is how
    many rows a verification of drafts may have; 0 where there is none.
    """

    budget: Budget
    rows: tuple[PlanRow, ...]
    lower_bound_bytes: int
    context: int
    max_rows: int
    kv_type: str
    kv_tokens: int
    cache_tokens: int
    keeps_first_pass: bool
    memory_map: bool
    kept_layers: int | None
    gave_up: tuple[str, ...]
    gpus: tuple[GpuPlan, ...] = ()
    verified_rows: int = 0

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
            "max_rows": self.max_rows,
            "kv_type": self.kv_type,
            "kv_tokens": self.kv_tokens,
            "cache_tokens": self.cache_tokens,
            "keeps_first_pass": self.keeps_first_pass,
            "memory_map": self.memory_map,
            "kept_layers": self.kept_layers,
            "gave_up": list(self.gave_up),
            "verified_rows": self.verified_rows,
            "gpu_layers": self.gpu_layers,
            "gpus": [gpu.to_dict() for gpu in self.gpus],
        }

    def __str__(self) -> str:
        width = max(len(row.owner) for row in self.rows)

        def line(owner: str, num_bytes: int, why: str) -> str:
            return f"{owner:<{width}}  {format_bytes(num_bytes):>10}  {why}"

        lines = [line(row.owner, row.num_bytes, row.why) for row in self.rows]
        limit = f"of {format_bytes(self.budget.num_bytes)} ({self.budget.source})"
        lines.append(line("planned peak", self.total_bytes, limit))
        for gpu in self.gpus:
            lines.append(f"{gpu.device.name}: {gpu.device.description}")
            lines += [line(row.owner, row.num_bytes, row.why) for row in gpu.rows]
            limit = f"of {format_bytes(gpu.budget_bytes)}"
            lines.append(line(f"on {gpu.device.name}", gpu.total_bytes, limit))
        lines += [f"gave up: {step}" for step in self.gave_up]
        return "\n".join(lines)
