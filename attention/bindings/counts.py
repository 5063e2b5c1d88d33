"""Counters of the kernels: what attention read, and what its scores cost."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScoreCost:
    """The cost of q·k scores over merged key blocks (delta by blocks).

    Sums over forward passes and layers, for the last query of each pass. A channel of a key counts once,
    however many query heads it is multiplied with: `channels_total` of all visible keys, `channels_merged`
    of those behind the window, of which `channels_stored` belong to stored blocks, and
    `channels_multiplied` for all that was multiplied, window and refined keys included; the additions of
    one partial product a block are not counted. `key_bytes_total` is the size of the visible keys in the KV
    cache, `key_bytes_read` the bytes that were read instead, block indices included.
    """

    channels_total: int = 0
    channels_merged: int = 0
    channels_stored: int = 0
    channels_multiplied: int = 0
    key_bytes_total: int = 0
    key_bytes_read: int = 0

    def __sub__(self, other: ScoreCost) -> ScoreCost:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return ScoreCost(*(after - before for after, before in pairs))

    @property
    def sparsity(self) -> float:
        """The share of multiplications skipped behind the window, as DeltaLLM defines sparsity."""
        return 1 - self.channels_stored / self.channels_merged if self.channels_merged else 0.0

    @property
    def skipped(self) -> float:
        """The share of all score multiplications that was skipped."""
        return 1 - self.channels_multiplied / self.channels_total if self.channels_total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "sparsity": round(self.sparsity, 4),
            "skipped": round(self.skipped, 4),
            "key_bytes_total": self.key_bytes_total,
            "key_bytes_read": self.key_bytes_read,
        }

    def __str__(self) -> str:
        behind = f"{self.sparsity:.0%} behind the window"
        return f"{self.skipped:.0%} of the score multiplications skipped ({behind})"


NO_COST = ScoreCost()


@dataclass(frozen=True, slots=True)
class KernelCounts:
    """What lowtide's kernels have done since they were created.

    `layers_native` run lowtide's attention in every forward pass, `layers_fallback` were left to the engine
    in at least one. `seconds` is the time spent in attention, `scratch_bytes` its scratch memory. Of the
    `keys_visible` that the last query of each pass could see, over all layers and passes, `keys_read` were
    attended to. `weight_bytes_evicted` counts mapped weights whose pages went back to the system,
    `matmuls_streamed` the matmuls that evicted their own weights on the way, `matmuls_repacked` the nodes
    that read repacked weights, `matmul_steps` in how many steps of all threads the matmuls among them were
    computed, `repacked_refused` the nodes that read repacked weights in an unsupported way. `scores` is the
    cost of scores over merged key blocks.
    """

    layers_native: int
    layers_fallback: int
    nodes_native: int
    nodes_fallback: int
    seconds: float
    scratch_bytes: int
    keys_read: int
    keys_visible: int
    weight_bytes_evicted: int
    matmuls_streamed: int
    matmuls_repacked: int
    matmul_steps: int
    repacked_refused: int
    scores: ScoreCost = NO_COST
