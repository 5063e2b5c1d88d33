"""BlockMatrix: quantised rows as onnxruntime's operators read them. Knows no file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUNDED_BITS, ROUNDED_BLOCK = 8, 32
"""What rows of floating-point numbers are rounded to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMatrix:
    """Rows of `columns` weights: weight = (quant - 2 ** (bits - 1)) * scale + offset.

    `quants` is (rows, columns) of uint8, `scales` and `offsets` (rows, columns / block_size) of float32;
    `offsets` is None where all are zero. MatMulNBits and GatherBlockQuantized (onnxruntime, "Contrib
    operators") mean the same without zero points; offsets are for the graph to add.
    """

    bits: int
    block_size: int
    quants: NDArray[Any]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None

    def packed(self) -> NDArray[Any]:
        """Return the rows' bytes: of 4 bits, the earlier quant is the lower half."""
        if self.bits == 8:
            return self.quants
        low, high = self.quants[:, 0::2], self.quants[:, 1::2]
        both: NDArray[Any] = low | (high << 4)
        return both

    def weights(self) -> NDArray[np.float32]:
        """Return the weights, (rows, columns)."""
        import numpy as np

        rows, num_blocks = self.scales.shape
        centred = self.quants.reshape(rows, num_blocks, -1).astype(np.float32)
        centred -= np.float32(1 << (self.bits - 1))
        found = centred * self.scales[:, :, None]
        if self.offsets is not None:
            found += self.offsets[:, :, None]
        return found.reshape(rows, -1)


def rounded(weights: NDArray[np.float32]) -> BlockMatrix:
    """Round rows to 8 bits in blocks of 32, each block's largest magnitude to 127."""
    import numpy as np

    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // ROUNDED_BLOCK, ROUNDED_BLOCK)
    scales = (np.abs(blocks).max(axis=2) / np.float32(127)).astype(np.float32)
    steps = np.where(scales > 0, scales, np.float32(1))[:, :, None]
    quants = (np.rint(blocks / steps) + 128).astype(np.uint8)
    return BlockMatrix(
        bits=ROUNDED_BITS,
        block_size=ROUNDED_BLOCK,
        quants=quants.reshape(rows, columns),
        scales=scales,
    )
