"""PlanLine: one line of a plan, in the process's memory or in a device's.

The owners of memory by name, as the plan, the ledger and the profiler have them.

Choice: what a plan may choose, as a value. Knows no formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lowtide.memory.units import format_bytes


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One owner's bytes and the reason for them."""

    component: str
    num_bytes: int
    why: str

    def to_dict(self) -> dict[str, str | int]:
        """Return the row for JSON."""
        return {"component": self.component, "bytes": self.num_bytes, "why": self.why}


INTERPRETER = "interpreter and libraries"
VOCABULARY = "vocabulary"
WEIGHTS = "weights"
CACHE = "KV cache"
COMPUTE = "compute buffer"
SCRATCH = "attention scratch"
SAMPLING = "logits and sampling"
PROMPT = "prompt and tokenising"
PREFIXES = "prefix cache"
FILTER_PREFILL = "first pass"
SPECULATION = "speculation"
DRAFT_WEIGHTS = "draft weights"
DRAFT_CACHE = "draft KV cache"
DRAFT_COMPUTE = "draft compute"
BATCH = "batch"
COMPARISON = "comparison"
PROFILER = "profiler"
LOADING = "loading"
RESERVE = "reserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """One way to open a model.

    `kv_tokens` is how many of the context's tokens the plan's KV cache has bytes for; more are admitted
    as the budget has room. `resident_layers` is None where the weights stay resident; else they are read again
    for every pass, but for so many layers that stay. `prefix_bytes` is what the prefix cache may hold,
    `cache_filter_pass` whether a filtered prompt's first pass stays for the next question, `verify_batch`
    how many rows a verification of drafts has; 0 where nothing is drafted.
    """

    context: int
    batch_size: int
    kv_type: str
    kv_tokens: int
    resident_layers: int | None = None
    prefix_bytes: int = 0
    cache_filter_pass: bool = False
    verify_batch: int = 0

    def downgrades_from(self, preferred: PlanCandidate) -> tuple[str, ...]:
        """Say, in words, what this choice lacks of the preferred one."""
        names = {"batch_size": "rows a pass", "kv_type": "KV type", "context": "context"}
        before, after = asdict(preferred), asdict(self)
        steps = [
            f"{name}: {before[key]} to {after[key]}"
            for key, name in names.items()
            if before[key] != after[key]
        ]
        if self.prefix_bytes < preferred.prefix_bytes:
            sizes = map(format_bytes, (preferred.prefix_bytes, self.prefix_bytes))
            steps.insert(0, f"prefix cache: {' to '.join(sizes)}")
        if preferred.cache_filter_pass and not self.cache_filter_pass:
            steps.insert(0, "a kept first pass: another question on the same text reads it again")
        if self.verify_batch < preferred.verify_batch:
            after_it = f"{self.verify_batch} rows" if self.verify_batch else "none"
            steps.insert(0, f"speculation: {preferred.verify_batch} rows to {after_it}")
        if self.kv_tokens < self.context:
            steps.append(f"room in the KV cache: {self.context} to {self.kv_tokens} tokens")
        if self.resident_layers is not None and preferred.resident_layers is None:
            steps.append(
                "resident weights: read again for every pass, about twice as long from the system's "
                "cache, at the disk's speed without it"
            )
        return tuple(steps)
