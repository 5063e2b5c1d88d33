"""StateUnits: which blocks of channels are sent in each layer and KV head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowtide.attention.delta.units import FULL_SCALE, scale_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEFT_DENSE = -1.0
"""The threshold of a layer that keeps its attention dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUnits:
    """Of every layer and KV head a threshold, and the root mean squares of its queries' channels.

    A block of `block` channels is sent where it is further than `thresholds` from all that its page has
    sent, as multiples of 1 over the channels' roots: `roots` is the largest, `scales` a byte a channel, how
    large the channel's is against that. Below a `share` of 1 each page of 64 keys has a threshold of its
    own instead, with which it sends no more than that share of its blocks. `sparsity` is the share that
    was not sent where thresholds were found; None where that is not known.
    """

    block: int
    thresholds: tuple[tuple[float, ...], ...]
    roots: tuple[tuple[float, ...], ...]
    scales: tuple[tuple[bytes, ...], ...]
    share: float = 1.0
    sparsity: float | None = None

    @staticmethod
    def uniform(
        num_layers: int,
        num_kv_heads: int,
        key_size: int,
        *,
        block: int,
        threshold: float = 0.0,
        share: float = 1.0,
    ) -> StateUnits:
        """Return units that are all alike, with channels that all count alike, of queries of 1."""
        return StateUnits(
            block=block,
            thresholds=((threshold,) * num_kv_heads,) * num_layers,
            roots=((1.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * key_size,) * num_kv_heads,) * num_layers,
            share=share,
        )

    @staticmethod
    def of_squares(
        squares: NDArray[np.float32], *, block: int, thresholds: NDArray[np.float32]
    ) -> StateUnits:
        """Return units of queries' mean squares by channel, (layers, kv_heads, key_size)."""
        import numpy as np

        roots = np.sqrt(squares.max(axis=2))
        return StateUnits(
            block=block,
            thresholds=tuple(tuple(map(float, layer)) for layer in thresholds),
            roots=tuple(tuple(float(f"{root:.4g}") for root in layer) for layer in roots),
            scales=scale_bytes(squares),
        )

    def all_at(self, threshold: float) -> StateUnits:
        """Return the same with one threshold, but for layers that are dense."""
        thresholds = tuple(
            tuple(LEFT_DENSE if of_unit < 0 else threshold for of_unit in layer)
            for layer in self.thresholds
        )
        return replace(self, thresholds=thresholds, sparsity=None)

    @property
    def num_taken(self) -> int:
        """How many layers and KV heads keep states."""
        return sum(len(layer) for layer in self.thresholds if min(layer) >= 0)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return thresholds and shares, (layers, kv_heads), and roots, (layers, kv_heads, key_size)."""
        import numpy as np

        thresholds = np.array(self.thresholds, np.float32)
        scales = np.array([[list(unit) for unit in layer] for layer in self.scales]) / FULL_SCALE
        roots = (scales * np.array(self.roots)[:, :, None]).astype(np.float32)
        return thresholds, np.full_like(thresholds, self.share), roots

    def __str__(self) -> str:
        if self.share < 1:
            return f"sparsity {1 - self.share:.0%}"
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:.0%}"
        stated = max(map(max, self.thresholds), default=0.0)
        return f"threshold {stated:g}"
