"""MemoryPlan: the bytes of every component, as a value that `planner.plan_memory` returns, and its table.

**A number in `lowtide plan` is wrong? Open three files.** cli/plan.py prints `str(MemoryPlan)`, the table
rendered below. Each line of the table is made by one method of `PlanLines` in memory/plan/lines.py. The
method calls one formula per term, in memory/plan/estimates.py (formulas of one attention policy stand beside
it, in memory/plan/attention.py). If llama.cpp or ONNX was asked instead of a formula, the term comes from a
`ContextSizes` that the backend (runtime/backends) passes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowtide.memory.budget import Budget
from lowtide.memory.plan.attention import NO_ATTENTION_MEMORY, AttentionMemory, FilterPrefill
from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.gpu import GpuBudget, GpuPlan
from lowtide.memory.plan.line import PlanLine
from lowtide.memory.plan.speculation.choices import SpeculationConfig, SpeculationTable
from lowtide.memory.units import format_bytes
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption

KV_TYPES = ("f16", "q8_0", "q4_0", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the user asked for; None leaves the choice to the planner."""

    context: int | None = None
    kv_type: str | None = None
    batch_size: int | None = None
    expected_tokens: int = 0
    """Tokens of the longest prompt with its answer, if they are known: they come before everything else."""
    threads: int = 2
    attention_threads: int = 0
    """Threads of lowtide's attention kernels; 0 if llama.cpp's own attention runs."""
    attention: AttentionMemory = NO_ATTENTION_MEMORY
    """Memory that the attention policy adds."""
    profiled: bool = False
    """Whether a profiler is attached."""
    prefix_bytes: int = 0
    """The largest size of the prefix cache; it shrinks if there is no room."""
    speculation: SpeculationConfig | None = None
    """The drafts to verify; None without speculation."""
    compared_tokens: int = 0
    """How many next-token distributions an evaluation holds at once."""
    structured: bool = False
    """Whether the memory of structured output is reserved."""
    rules_bytes: int = 0
    """Bytes that the rules of answers hold (`OutputFormat.num_bytes`)."""
    server_bytes: int = 0
    """Bytes of the server that the model answers for: connections, bodies, answers that are not read yet."""
    sequences: int = 1
    """How many answers run together, in a cache of their own where there are several."""
    repacked: bool = False
    """Whether the weights are a repacked copy for lowtide's matmul kernels."""
    optional_attention: bool = False
    optional_repack: bool = False
    """Whether lowtide's attention, and its matmuls, run where the budget has room for what they need."""
    gpu: GpuBudget | None = None
    """Which GPUs take layers and how much memory on each; None without a GPU."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise BadOption(f"{option('context')} is {self.context}; it must be at least 1 token")
        if self.expected_tokens < 0:
            raise BadOption(
                f"expected_tokens is {self.expected_tokens}; it must be 0, for unknown, or more"
            )
        if self.kv_type is not None and self.kv_type not in KV_TYPES:
            raise BadOption(
                f"{option('kv_type')} is {self.kv_type!r}; it must be one of {', '.join(KV_TYPES)}"
            )
        if self.batch_size is not None and not 1 <= self.batch_size <= 4096:
            raise BadOption(
                f"{option('batch_size')} is {self.batch_size}; it must be between 1 and 4096"
            )

    @property
    def has_optional_kernels(self) -> bool:
        """Whether the plan may leave lowtide's kernels out."""
        return self.optional_attention or self.optional_repack

    @property
    def filter_prefill(self) -> FilterPrefill | None:
        """The prefill that filters prompts; None if all layers read every prompt whole."""
        return self.attention.filter_prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessBaseline:
    """What the planner must know about this process and system.

    `interpreter_bytes` is the resident set before any model is loaded; `processor` is
    `platform.machine()`. `kv_on_demand` says whether KV slots without a token take no memory (see
    memory/os/kv_pages.py), `can_stream_weights` whether pages of mapped weights can be released between the
    layers (see memory/os/file_mappings.py). A measured `vocabulary_bytes` replaces the formula;
    `tolerance_bytes` is how much measurements differ from run to run. `repacks` says whether llama.cpp may
    copy weights into layouts of its own. `vocabulary_loading_bytes` are needed for a moment while the
    vocabulary is loaded, before the weights are. A measured `header_loading_bytes` replaces the formula of what
    reading the header takes for a moment beside the vocabulary, a measured `template_bytes` that of what compiling the
    chat template takes for a moment. `prompt_tokens` are those of the prompt that is held while the
    model is planned, with its answer.
    """

    interpreter_bytes: int
    processor: str
    kv_on_demand: bool = False
    can_stream_weights: bool = False
    repacks: bool = True
    vocabulary_bytes: int | None = None
    vocabulary_loading_bytes: int = 0
    header_loading_bytes: int | None = None
    template_bytes: int | None = None
    prompt_tokens: int = 0
    tolerance_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The planned bytes of every component, and the choices behind them.

    `rows` has one `PlanLine` per component of this process; `gpus` has those of each GPU that takes layers,
    with a budget of its own. `downgrades` describes in words what did not fit into the budget. `kv_tokens`
    is how many of the context's tokens the KV cache's line covers; the cache may grow beyond it while the
    budget has room. `resident_layers` layers keep their weights resident and the others are streamed in
    every pass; None if all weights are resident. `verify_batch` is the number of tokens per verification of
    `drafts`: 0 without speculation, 1 where drafts are only watched. `branches` says whether drafts are trees.
    `speculation` has all choices, with what each takes and promises.
    `own_kernels` says whether the kernels that the request leaves open are lowtide's. `batch` is the cache of answers
    that run together; None where one runs at a time.
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
    more_gpu_layers: Mapping[str, int] = field(default_factory=dict)
    """How many more layers another GiB on each device with memory of its own would take."""
    verify_batch: int = 0
    drafts: tuple[str, ...] = ()
    branches: bool = False
    speculation: SpeculationTable | None = None
    own_kernels: bool = False
    batch: BatchPlan | None = None

    @property
    def total_bytes(self) -> int:
        """The planned peak: the sum of all lines."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the planned peak fits the budget, and each device's bytes fit its own budget."""
        return self.total_bytes <= self.budget.num_bytes and all(gpu.fits for gpu in self.gpus)

    @property
    def gpu_layers(self) -> int:
        """How many layers the devices hold; llama.cpp counts the output matrix as one more layer."""
        return sum(gpu.num_layers for gpu in self.gpus)

    @property
    def gpu_cache_bytes(self) -> int:
        """The bytes of the KV cache that lie on devices."""
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
            "sequences": self.batch.num_sequences if self.batch else 1,
            "batch_kv_tokens": self.batch.num_kv_tokens if self.batch else 0,
            "speculation": self.speculation.to_dict() if self.speculation else None,
            "gpu_layers": self.gpu_layers,
            "gpus": [gpu.to_dict() for gpu in self.gpus],
            "more_gpu_layers": dict(self.more_gpu_layers),
        }

    def __str__(self) -> str:
        """Return the plan as a table: component, size, a bar of its share of the budget, and the reason."""
        budget, lines = self.budget, [("Component", "Size", "", "Why")]
        lines += _table(self.rows, "planned peak", budget.num_bytes, f" ({budget.source})")
        for gpu in self.gpus:
            lines.append((f"{gpu.device.name}: {gpu.device.description}", "", "", ""))
            lines += _table(gpu.rows, f"total on {gpu.device.name}", gpu.budget_bytes)
        widths = [max(len(line[column]) for line in lines if line[1]) for column in range(3)]
        text = [
            f"{name:<{widths[0]}}  {size:>{widths[1]}}  {bar:<{widths[2]}}  {why}".rstrip()
            for name, size, bar, why in lines
        ]
        text += [
            f"Another GiB on {name} would take {count} more layers"
            for name, count in self.more_gpu_layers.items()
            if count
        ]
        return "\n".join([*text, *(f"Reduced to fit: {step}" for step in self.downgrades)])


def _table(
    rows: Sequence[PlanLine], total: str, budget_bytes: int, source: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, size, bar and reason of each line, and last those of the sum against its limit."""
    for row in rows:
        size, bar = format_bytes(row.num_bytes), _bar(row.num_bytes, budget_bytes)
        yield row.component, size, bar, row.why
    total_bytes = sum(row.num_bytes for row in rows)
    limit = f"of {format_bytes(budget_bytes)}{source}"
    yield total, format_bytes(total_bytes), _bar(total_bytes, budget_bytes), limit


def _bar(num_bytes: int, budget_bytes: int, width: int = 12) -> str:
    """Return a bar of up to `width` characters for the share of the budget."""
    eighths = min(round(8 * width * num_bytes / max(budget_bytes, 1)), 8 * width)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip())
