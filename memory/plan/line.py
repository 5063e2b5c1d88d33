"""PlanLine: one component's bytes in a plan. PlanCandidate: one combination of what the planner can choose."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lowtide.memory.plan.speculation.allocator import NO_SPECULATION, SpeculationChoice
from lowtide.memory.units import format_bytes


@dataclass(frozen=True, slots=True)
class PlanLine:
    """The bytes of one component, in the process or on a device, and the reason for them."""

    component: str
    num_bytes: int
    why: str

    def to_dict(self) -> dict[str, str | int]:
        """Return the line for JSON."""
        return {"component": self.component, "bytes": self.num_bytes, "why": self.why}


# The components' names, as the plan, the ledger and the profiler use them.
INTERPRETER = "interpreter and libraries"
VOCABULARY = "vocabulary"
WEIGHTS = "weights"
CACHE = "KV cache"
COMPUTE = "compute buffer"
DRIVER = "GPU driver"
SCRATCH = "attention scratch"
SAMPLING = "logits and sampling"
PROMPT = "prompt and tokenising"
PREFIXES = "prefix cache"
FILTER_PREFILL = "filter prefill"
SPECULATION = "speculation"
DRAFT_WEIGHTS = "draft weights"
DRAFT_CACHE = "draft KV cache"
DRAFT_COMPUTE = "draft compute"
STRUCTURED = "structured output"
RULES = "rules of answers"
SERVER = "server"
BATCH = "batch"
EMBEDDINGS = "embeddings"
VECTORS = "vectors"
COMPARISON = "comparison"
PROFILER = "profiler"
LOADING = "loading"
RESERVE = "reserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """One way to open a model.

    `kv_tokens` is how many of the context's tokens have KV cache bytes in the plan; further tokens are
    admitted while the budget has room. `resident_layers` is None if all weights stay resident; otherwise
    only that many layers do and the others are streamed from the file in every pass. `prefix_bytes` is the
    size of the prefix cache, `cache_filter_pass` whether the filter prefill of a prompt is cached for the
    next question, and `speculation` the drafts and the tokens per verification.
    `own_kernels` says whether the kernels that the request leaves open are lowtide's or the engine's.
    """

    context: int
    batch_size: int
    kv_type: str
    kv_tokens: int
    resident_layers: int | None = None
    prefix_bytes: int = 0
    cache_filter_pass: bool = False
    speculation: SpeculationChoice = NO_SPECULATION
    own_kernels: bool = False

    def downgrades_from(self, preferred: PlanCandidate) -> tuple[str, ...]:
        """Describe in words what this candidate lacks compared to the preferred one."""
        names = {"batch_size": "batch size", "kv_type": "KV type", "context": "context"}
        before, after = asdict(preferred), asdict(self)
        steps = [
            f"{name}: {before[key]} to {after[key]}"
            for key, name in names.items()
            if before[key] != after[key]
        ]
        if preferred.own_kernels and not self.own_kernels:
            steps.insert(0, "kernels: lowtide's to the engine's own")
        if self.prefix_bytes < preferred.prefix_bytes:
            sizes = map(format_bytes, (preferred.prefix_bytes, self.prefix_bytes))
            steps.insert(0, f"prefix cache: {' to '.join(sizes)}")
        if preferred.cache_filter_pass and not self.cache_filter_pass:
            steps.insert(0, "filter prefill: not cached, every question on a text reads it again")
        verify_batch = self.speculation.verify_batch
        preferred_batch = preferred.speculation.verify_batch
        if verify_batch < preferred_batch and preferred_batch > 1:
            now = f"{verify_batch} tokens" if verify_batch > 1 else "off"
            steps.insert(0, f"speculation: {preferred_batch} tokens per verification to {now}")
        if self.kv_tokens < self.context:
            steps.append(f"KV cache: {self.context} to {self.kv_tokens} tokens planned")
        if self.resident_layers is not None and preferred.resident_layers is None:
            steps.append(
                "weights: streamed from the file in every pass, which takes about twice as long from the "
                "page cache, and runs at the disk's speed without it"
            )
        return tuple(steps)
