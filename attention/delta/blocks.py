"""Delta by channel blocks, or single channels: a block that repeats a stored one is not multiplied again.

Behind the window, a block of a key's channels is merged into the most similar stored block of its page of
64, if that is close enough; it then reuses that block's q·k partial product. Any other block is stored.
Values are read as they are: at most half of attention is saved. The paper compares a block with the last one
stored before it; the comparison with all stored blocks of the page measured much better.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import DeltaBlocksRule
from lowtide.attention.calibration import Calibration
from lowtide.attention.delta.head_params import (
    FULL_SCALE,
    PAGE_KEYS,
    Span,
    StartPass,
    number_words,
    read_numbers,
    read_scales,
    refine_bytes,
    scale_array,
    scale_bytes,
    scale_words,
)
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.memory.plan.estimates import attention_bytes, padded_context
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEFT_DENSE = -1.0
"""The threshold of a layer that stays dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMemory(AttentionMemory):
    """Stored blocks of `block` channels, for the keys of `num_heads` layers and KV heads."""

    num_heads: int
    block: int
    refines: bool

    @property
    def description(self) -> str:
        """What is held; an upper bound, as if nothing were merged."""
        return "key blocks beside the cache, at most"

    def scratch_bytes(self, spec: ModelSpec, context: int, threads: int) -> int:
        """Return the bytes of the blocks, of a scratch as dense attention has it, and of refining."""
        slots = padded_context(context)
        refining = refine_bytes(spec, slots, threads) if self.refines else 0
        held = self.num_bytes(slots, spec.key_head_dim)
        return held + attention_bytes(spec, context, threads) + refining

    def num_bytes(self, num_slots: int, head_dim: int) -> int:
        """Return the most bytes for `num_slots` slots: every block stored, in half precision, with the index
        of each key's stored block, and where each page begins."""
        pages = num_slots // PAGE_KEYS
        stored = 2 * (pages * PAGE_KEYS * head_dim + 16)
        indices = (PAGE_KEYS + 1) * pages * (head_dim // self.block)
        return self.num_heads * (stored + indices + 16 * (pages + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadThresholds:
    """Delta's parameters by blocks, for each layer and KV head.

    A block of `block` channels is stored if its distance from all stored blocks of its page is above
    `thresholds`, as a multiple of 1 over the root mean square of the queries' channels: `query_rms` is the
    largest of them, `scales`, a byte a channel, each one relative to that. With `share` below 1 every page
    of 64 keys has a threshold of its own instead, with which it stores at most that share of its blocks.
    `sparsity` is the share of channels that was merged during calibration; None if it is not known.
    """

    block: int
    thresholds: tuple[tuple[float, ...], ...]
    query_rms: tuple[tuple[float, ...], ...]
    scales: tuple[tuple[bytes, ...], ...]
    share: float = 1.0
    sparsity: float | None = None

    @staticmethod
    def uniform(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block: int,
        threshold: float = 0.0,
        share: float = 1.0,
    ) -> HeadThresholds:
        """Return the same parameters for every head, for queries whose channels have a mean square of 1."""
        return HeadThresholds(
            block=block,
            thresholds=((threshold,) * num_kv_heads,) * num_layers,
            query_rms=((1.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * head_dim,) * num_kv_heads,) * num_layers,
            share=share,
        )

    def without(self, layers: Collection[int]) -> HeadThresholds:
        """Return the parameters with these layers dense."""
        return replace(
            self,
            thresholds=tuple(
                (LEFT_DENSE,) * len(heads) if layer in layers else heads
                for layer, heads in enumerate(self.thresholds)
            ),
        )

    @staticmethod
    def of_squares(
        squares: NDArray[np.float32], *, block: int, thresholds: NDArray[np.float32]
    ) -> HeadThresholds:
        """Return parameters from the mean squares of queries' channels, (layers, kv_heads, head_dim)."""
        import numpy as np

        query_rms = np.sqrt(squares.max(axis=2))
        return HeadThresholds(
            block=block,
            thresholds=tuple(tuple(map(float, layer)) for layer in thresholds),
            query_rms=tuple(tuple(float(f"{rms:.4g}") for rms in layer) for layer in query_rms),
            scales=scale_bytes(squares),
        )

    @staticmethod
    def of(found: Calibration, spec: ModelSpec, block: int) -> HeadThresholds:
        """Return the parameters of a calibration; raises `CalibrationError`."""
        return HeadThresholds(
            block=block,
            thresholds=read_numbers(found, "thresholds", spec, LEFT_DENSE),
            query_rms=read_numbers(found, "query_rms", spec, 0.0),
            scales=read_scales(found, spec),
            sparsity=found.metric("sparsity"),
        )

    def to_params(self) -> dict[str, object]:
        """Return the params of a calibration file: a text for each layer."""
        return {
            "thresholds": number_words(self.thresholds),
            "query_rms": number_words(self.query_rms),
            "scales": scale_words(self.scales),
        }

    def all_at(self, threshold: float) -> HeadThresholds:
        """Return the same with one threshold for all heads, except in layers that stay dense."""
        thresholds = tuple(
            tuple(LEFT_DENSE if old < 0 else threshold for old in layer)
            for layer in self.thresholds
        )
        return replace(self, thresholds=thresholds, sparsity=None)

    def memory(self, span: Span) -> BlockMemory:
        """Return the memory of the blocks."""
        num_heads = sum(len(layer) for layer in self.thresholds if min(layer) >= 0)
        return BlockMemory(num_heads=num_heads, block=self.block, refines=span.refine > 0)

    def configure(self, kernels: AttentionKernels, span: Span) -> StartPass:
        """Set each head's threshold and scales."""
        rule = DeltaBlocksRule(span.window, span.sinks, self.block, span.refine)
        kernels.blocks.set_head_params(rule, *self.arrays())
        return kernels.blocks.start

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return thresholds and shares (layers, kv_heads), and query_rms (layers, kv_heads, head_dim)."""
        import numpy as np

        thresholds = np.array(self.thresholds, np.float32)
        query_rms = scale_array(self.scales) * np.array(self.query_rms)[:, :, None]
        return thresholds, np.full_like(thresholds, self.share), query_rms.astype(np.float32)

    def describe(self) -> str:
        """Name the sparsity, or the threshold if the sparsity follows from it."""
        if self.share < 1:
            return f"sparsity {1 - self.share:.0%}"
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:.0%}"
        return f"threshold {max(map(max, self.thresholds), default=0.0):g}"
