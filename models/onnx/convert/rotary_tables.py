"""Cosines and sines of rotary positions, as GroupQueryAttention reads them (Su et al., RoFormer, 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.models.onnx.convert.decoder_shape import Rotary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLICE = 4096
"""So many positions are computed in double precision at a time."""


def rotary_tables(
    rotary: Rotary, head_size: int, num_positions: int, factors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return both tables, (positions, head size / 2) of float32.

    `factors`, (head size / 2,), divide the angles one by one, as llama.cpp has Llama 3's scaling.
    """
    import numpy as np

    steps = rotary.base ** (-2.0 * np.arange(head_size // 2, dtype=np.float64) / head_size)
    if factors is not None:
        steps /= factors
    cosines, sines = (np.empty((num_positions, head_size // 2), np.float32) for _ in range(2))
    for start in range(0, num_positions, SLICE):
        positions = np.arange(start, min(start + SLICE, num_positions), dtype=np.float64)
        angles = positions[:, None] * (steps / rotary.divisor)
        cosines[start : start + SLICE] = np.cos(angles)
        sines[start : start + SLICE] = np.sin(angles)
    return cosines, sines
