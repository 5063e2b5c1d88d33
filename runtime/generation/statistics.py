"""What one answer cost. Every chunk of the answer carries these values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowtide.memory.reclaim import Reclaimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counts in tokens, times in seconds, sizes in bytes. None means unknown, or not known yet."""

    prompt_tokens: int
    """Tokens of the prompt, dropped ones included."""
    reused_tokens: int
    """Prompt tokens that were in the KV cache before, and were not computed again."""
    retained_tokens: int
    """Prompt tokens that every layer reads (GemFilter may retain fewer than the prompt has)."""
    dropped_tokens: int
    """Prompt tokens left out by `overflow="drop-oldest"`."""
    dropped_messages: int
    """Chat messages left out by `overflow="drop-oldest"`."""
    generated_tokens: int
    """Sampled tokens, without the end-of-text token."""
    prefill_s: float
    """Seconds from the start of the generation to the end of the prompt's last pass."""
    decode_s: float
    """Seconds from the first sampled token to the last one."""
    time_to_first_token_s: float | None
    """Seconds from the request to the first sampled token (TTFT)."""
    layers_native: int
    """Layers whose attention ran on lowtide's kernels."""
    layers: int
    """Layers of the model."""
    seed: int
    """Seed of the sampler, also where the caller gave none."""
    budget_bytes: int
    """The memory budget in bytes."""
    planned_bytes: int
    """Bytes of the memory plan, with the batch's where there is one."""
    restored_tokens: int = 0
    """Of `reused_tokens`, those that the prefix cache restored."""
    attention: str = "llama"
    """The attention policy and its settings."""
    attended_share: float | None = None
    """Share (0 to 1) of the cached keys that decoding attended to; on the last chunk."""
    scores: dict[str, Any] | None = None
    """With `delta` on channel blocks: cost and savings of the attention scores (`ScoreCost`)."""
    kernels: dict[str, str] | None = None
    """Who computed attention and matmuls, with the instruction set, and the engine's library."""
    repacked_tensors: int = 0
    """Matrices that lowtide's matmul kernels multiplied."""
    not_repacked_reason: str | None = None
    """Why no matrix was repacked although the plan has repacked weights."""
    peak_rss_bytes: int | None = None
    """Peak resident set of the process so far, in bytes; on the last chunk."""
    speculation: dict[str, Any] | None = None
    """What speculative decoding did (`SpeculationController.statistics`); on the last chunk."""
    structured: dict[str, Any] | None = None
    """With a constraint, on the last chunk: how it was enforced, whether the answer is complete, and whether the
    constraint closed it (`ConstrainedAnswer.statistics`)."""
    batch: dict[str, Any] | None = None
    """The batch of this answer: sequences, KV tokens, bytes, and whether a greedy answer is identical to that of its
    prompt alone."""
    threads: int | None = None
    """Threads that computed the last pass: fewer than the cores while others use them. None where the caller's own
    model computes."""
    trims: tuple[Reclaimed, ...] = ()
    """What the watchdog released because the process came near its budget, by level."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Computed (not reused) prompt tokens per second."""
        return _rate(self.retained_tokens - self.reused_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Generated tokens per second, without the first one, which the prefill computes."""
        return _rate(self.generated_tokens - 1, self.decode_s)

    def to_dict(self) -> dict[str, Any]:
        """Return every field and both rates for JSON."""
        return {
            **asdict(self),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
