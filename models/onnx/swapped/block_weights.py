"""BlockWeights: a graph's quantised matrix, and its rows in ggml's blocks. Knows no operator of ours.

MatMulNBits (onnxruntime, "Contrib operators") keeps a matrix as quants of 4 or 8 bits with a scale, and a
zero point or not, for every block of columns; ggml's Q4_0, Q4_1 and Q8_0 say the same with numbers of two
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import BadModelFile
from lowtide.models.onnx.graph import Weight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_SIZE = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
ELEMENTS = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """(num_rows, num_columns) weights: (quant - zero point) * scale + offset, for every block of columns.

    Zero points are 2 ** (bits - 1) where `zeros` is None; offsets, (blocks, rows), are None where all are
    0. All weights lie in files beside the graph.
    """

    num_rows: int
    num_columns: int
    bits: int
    block_size: int
    quants: Weight
    scales: Weight
    zeros: Weight | None = None
    offsets: Weight | None = None

    @property
    def type_name(self) -> str:
        """ggml's name of the type that says the same."""
        if self.bits == 8:
            return "Q8_0"
        return "Q4_0" if self.zeros is None and self.offsets is None else "Q4_1"

    @property
    def num_bytes(self) -> int:
        """The bytes of all rows in ggml's blocks."""
        return self.num_rows * self.num_columns // BLOCK_SIZE * BLOCK_BYTES[self.type_name]

    def ggml_rows(self, folder: Path, num_rows: int) -> Iterator[NDArray[np.uint8]]:
        """Yield (so many rows, bytes of a row) after one another, of files in `folder`.

        Scales and minima become numbers of two bytes. Raises `BadModelFile` where one is too large for
        that, or no number.
        """
        for begin in range(0, self.num_rows, num_rows):
            yield self._rows(folder, slice(begin, min(begin + num_rows, self.num_rows)))

    def _rows(self, folder: Path, rows: slice) -> NDArray[np.uint8]:
        import numpy as np

        num_rows = rows.stop - rows.start
        scales = self._by_block(folder, self.scales, rows)
        parts = [_halves(scales, self.scales.name)]
        if self.type_name == "Q4_1":
            minima = self._minima(folder, rows, scales)
            parts.append(_halves(minima, self.quants.name))
        parts.append(self._values(folder, rows))
        blocks = np.concatenate(parts, axis=2)
        return np.ascontiguousarray(blocks).reshape(num_rows, -1)

    def _values(self, folder: Path, rows: slice) -> NDArray[np.uint8]:
        """The quants of ggml's blocks, (rows, blocks, bytes)."""
        import numpy as np

        stored = _mapped(folder, self.quants).reshape(self.num_rows, -1)[rows]
        if self.bits == 8:
            eights: NDArray[np.uint8] = stored.reshape(len(stored), -1, BLOCK_SIZE) ^ np.uint8(128)
            return eights
        pairs = stored.reshape(len(stored), -1, BLOCK_SIZE // 2)
        quants = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(*pairs.shape[:2], BLOCK_SIZE)
        half = BLOCK_SIZE // 2
        fours: NDArray[np.uint8] = quants[..., :half] | (quants[..., half:] << 4)
        return fours

    def _minima(
        self, folder: Path, rows: slice, scales: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        import numpy as np

        if self.offsets is not None:
            stored = _mapped(folder, self.offsets).reshape(-1, self.num_rows)[:, rows]
            return self._repeated(np.asarray(stored.T, np.float32)) - 8 * scales
        assert self.zeros is not None, "it has one of both"
        packed = _mapped(folder, self.zeros).reshape(self.num_rows, -1)[rows]
        points = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
        num_blocks = self.num_columns // self.block_size
        return -self._repeated(points[:, :num_blocks].astype(np.float32)) * scales

    def _by_block(self, folder: Path, weight: Weight, rows: slice) -> NDArray[np.float32]:
        import numpy as np

        stored = _mapped(folder, weight).reshape(self.num_rows, -1)[rows]
        return self._repeated(np.asarray(stored, np.float32))

    def _repeated(self, by_block: NDArray[np.float32]) -> NDArray[np.float32]:
        """What belongs to the graph's blocks, for each of ggml's."""
        import numpy as np

        return np.repeat(by_block, self.block_size // BLOCK_SIZE, axis=1)


def _halves(numbers: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """As numbers of two bytes, (rows, blocks, 2)."""
    import numpy as np

    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(numbers, np.float32).astype("<f2")
    largest = float(np.abs(halves).max(initial=0))
    if not isfinite(largest):
        raise BadModelFile(
            f"{name} has a scale, or a minimum, beyond what two bytes hold: leave --pack out"
        )
    return halves.view(np.uint8).reshape(*halves.shape, 2)


def _mapped(folder: Path, weight: Weight) -> NDArray[Any]:
    """A weight's elements in a row, mapped from its file."""
    import numpy as np

    assert weight.location is not None, "it lies beside the graph"
    dtype = np.dtype(ELEMENTS[weight.element_type])
    path = folder / weight.location
    return np.memmap(path, dtype, "r", weight.offset, (weight.num_bytes // dtype.itemsize,))
