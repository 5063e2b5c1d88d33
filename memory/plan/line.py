"""PlanRow: one line of a plan, in the process's memory or in a device's.

The owners of memory by name, as the plan, the ledger and the profiler have them.

Choice: what a plan may choose, as a value. Knows no formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lowtide.memory.units import format_bytes


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One owner's bytes and the reason for them."""

    owner: str
    num_bytes: int
    why: str

    def to_dict(self) -> dict[str, str | int]:
        """Return the row for JSON."""
        return {"owner": self.owner, "bytes": self.num_bytes, "why": self.why}


INTERPRETER = "interpreter and libraries"
VOCABULARY = "vocabulary"
WEIGHTS = "weights"
CACHE = "KV cache"
COMPUTE = "compute buffer"
SCRATCH = "attention scratch"
SAMPLING = "logits and sampling"
PROMPT = "prompt and tokenising"
PREFIXES = "prefix cache"
FIRST_PASS = "first pass"
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
class Choice:
    """One way to open a model.

    `kv_tokens` is how many of the context's tokens the plan's KV cache has bytes for; more are admitted
    as the budget has room. `kept_layers` is None where the weights stay resident; else they are read again
    for every pass, but for so many layers that stay. `prefix_bytes` is what the prefix cache may hold,
    `keeps_first_pass` whether a filtered prompt's first pass stays for the next question, `verified_rows`
    how many rows a verification of drafts has; 0 where nothing is drafted.
    """

    context: int
    max_rows: int
    kv_type: str
    kv_tokens: int
    kept_layers: int | None = None
    prefix_bytes: int = 0
    keeps_first_pass: bool = False
    verified_rows: int = 0

    def given_up(self, preferred: Choice) -> tuple[str, ...]:
        """Say, in words, what this choice lacks of the preferred one."""
        names = {"max_rows": "rows a pass", "kv_type": "KV type", "context": "context"}
        before, after = asdict(preferred), asdict(self)
        steps = [
            f"{name}: {before[key]} to {after[key]}"
            for key, name in names.items()
            if before[key] != after[key]
        ]
        if self.prefix_bytes < preferred.prefix_bytes:
            sizes = map(format_bytes, (preferred.prefix_bytes, self.prefix_bytes))
            steps.insert(0, f"prefix cache: {' to '.join(sizes)}")
        if preferred.keeps_first_pass and not self.keeps_first_pass:
            steps.insert(0, "a kept first pass: another question on the same text reads it again")
        if self.verified_rows < preferred.verified_rows:
            after_it = f"{self.verified_rows} rows" if self.verified_rows else "none"
            steps.insert(0, f"speculation: {preferred.verified_rows} rows to {after_it}")
        if self.kv_tokens < self.context:
            steps.append(f"room in the KV cache: {self.context} to {self.kv_tokens} tokens")
        if self.kept_layers is not None and preferred.kept_layers is None:
            steps.append(
                "resident weights: read again for every pass, about twice as long from the system's "
                "cache, at the disk's speed without it"
            )
        return tuple(steps)
