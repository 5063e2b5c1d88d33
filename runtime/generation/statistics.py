"""Statistics: what one answer cost. Travels with every piece of the answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowtide.memory.reclaim import Reclaimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counts in tokens, times in seconds, sizes in bytes; None is "not known (yet)".

    `reused_tokens` of the prompt were in the KV cache already, `restored_tokens` of these because the
    prefix cache put them back; `retained_tokens` of it are seen by all of the model (a policy may filter it),
    `dropped_tokens` and `dropped_messages` went to `--overflow drop-oldest`. `layers_native` of `layers`
    ran our attention kernels under the policy `attention`; `attended_share` of the cached keys were
    attended to while decoding. `scores` is what those of decoding cost and saved where keys are states
    (`ScoreCost`). `repacked_tensors` matrices were multiplied by our kernels; `not_repacked_reason`
    says why none was, where that was wanted. `peak_rss_bytes` is the process's peak so far. It, the share
    and `speculation` (None where nothing is drafted) are read at the end of an answer. `trims` are what was
    given back because the process came near its budget, `batch` tells of answers generated together.
    """

    prompt_tokens: int
    reused_tokens: int
    retained_tokens: int
    dropped_tokens: int
    dropped_messages: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float | None
    layers_native: int
    layers: int
    seed: int
    budget_bytes: int
    planned_bytes: int
    restored_tokens: int = 0
    attention: str = "llama"
    attended_share: float | None = None
    scores: dict[str, Any] | None = None
    repacked_tensors: int = 0
    not_repacked_reason: str | None = None
    peak_rss_bytes: int | None = None
    speculation: dict[str, Any] | None = None
    batch: dict[str, Any] | None = None
    trims: tuple[Reclaimed, ...] = ()

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens computed (not reused) for each second."""
        return _rate(self.retained_tokens - self.reused_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first for each second: the first one belongs to the prompt's pass."""
        return _rate(self.generated_tokens - 1, self.decode_s)

    def to_dict(self) -> dict[str, Any]:
        """Return every field and rate for JSON."""
        return {
            **asdict(self),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
