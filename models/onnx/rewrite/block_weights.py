"""Quantised matrices of an ONNX graph, converted to ggml's blocks.

MatMulNBits (onnxruntime, "Contrib operators") stores a matrix as 4- or 8-bit quants with a scale, and
optionally a zero point, for every block of columns. ggml's Q4_0, Q4_1 and Q8_0 store the same with fp16
scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadModelFile
from lowtide.models.gguf.header.reader import TENSOR_TYPES, TYPE_NUMBERS
from lowtide.models.onnx.graph import Weight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GGML_BLOCK = 32
"""Columns of a block of Q4_0, Q4_1 and Q8_0."""
NUMPY_TYPES = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """A (num_rows, num_columns) matrix of (quant - zero point) * scale + offset, per block of columns.

    Where `zeros` is None every zero point is 2 ** (bits - 1); where `offsets`, (blocks, rows), is None every
    offset is 0. All weights lie in files beside the graph.
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
        """The equivalent ggml type: Q8_0, Q4_0, or Q4_1 where blocks have a minimum."""
        if self.bits == 8:
            return "Q8_0"
        return "Q4_0" if self.zeros is None and self.offsets is None else "Q4_1"

    @property
    def num_bytes(self) -> int:
        """The bytes of all rows in ggml's blocks."""
        _, elements, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[self.type_name]]
        return self.num_rows * self.num_columns // elements * block_bytes

    def ggml_rows(self, folder: Path, num_rows: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the matrix in ggml's blocks, up to `num_rows` rows at a time, (rows, bytes of a row).

        The weights are read from files in `folder`. Scales and minima are rounded to fp16. Raises
        `BadModelFile` where one is not finite in fp16.
        """
        for begin in range(0, self.num_rows, num_rows):
            yield self._rows(folder, slice(begin, min(begin + num_rows, self.num_rows)))

    def _rows(self, folder: Path, rows: slice) -> NDArray[np.uint8]:
        import numpy as np

        num_rows = rows.stop - rows.start
        scales = self._block_values(folder, self.scales, rows)
        parts = [_fp16_bytes(scales, self.scales.name)]
        if self.type_name == "Q4_1":
            minima = self._minima(folder, rows, scales)
            parts.append(_fp16_bytes(minima, self.quants.name))
        parts.append(self._quants(folder, rows))
        blocks = np.concatenate(parts, axis=2)
        return np.ascontiguousarray(blocks).reshape(num_rows, -1)

    def _quants(self, folder: Path, rows: slice) -> NDArray[np.uint8]:
        """Return the quants in ggml's order, (rows, blocks, bytes)."""
        import numpy as np

        stored = _mapped(folder, self.quants).reshape(self.num_rows, -1)[rows]
        if self.bits == 8:
            signed: NDArray[np.uint8] = stored.reshape(len(stored), -1, GGML_BLOCK) ^ np.uint8(128)
            return signed
        pairs = stored.reshape(len(stored), -1, GGML_BLOCK // 2)
        quants = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(*pairs.shape[:2], GGML_BLOCK)
        half = GGML_BLOCK // 2
        nibbles: NDArray[np.uint8] = quants[..., :half] | (quants[..., half:] << 4)
        return nibbles

    def _minima(
        self, folder: Path, rows: slice, scales: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        import numpy as np

        if self.offsets is not None:
            stored = _mapped(folder, self.offsets).reshape(-1, self.num_rows)[:, rows]
            return self._per_ggml_block(np.asarray(stored.T, np.float32)) - 8 * scales
        assert self.zeros is not None, "Q4_1 has zero points or offsets"
        packed = _mapped(folder, self.zeros).reshape(self.num_rows, -1)[rows]
        points = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
        num_blocks = self.num_columns // self.block_size
        return -self._per_ggml_block(points[:, :num_blocks].astype(np.float32)) * scales

    def _block_values(self, folder: Path, weight: Weight, rows: slice) -> NDArray[np.float32]:
        import numpy as np

        stored = _mapped(folder, weight).reshape(self.num_rows, -1)[rows]
        return self._per_ggml_block(np.asarray(stored, np.float32))

    def _per_ggml_block(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Repeat one value per block of the graph for each of ggml's smaller blocks."""
        import numpy as np

        return np.repeat(values, self.block_size // GGML_BLOCK, axis=1)


def _fp16_bytes(numbers: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """Return the numbers in fp16, (rows, blocks, 2)."""
    import numpy as np

    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(numbers, np.float32).astype("<f2")
    largest = float(np.abs(rounded).max(initial=0))
    if not isfinite(largest):
        raise BadModelFile(
            f"{name} has a scale or a minimum that does not fit fp16: leave {option('repack', True)} out"
        )
    return rounded.view(np.uint8).reshape(*rounded.shape, 2)


def _mapped(folder: Path, weight: Weight) -> NDArray[Any]:
    """Return a weight's elements, one dimension, mapped from its file."""
    import numpy as np

    assert weight.location is not None, "the weight lies beside the graph"
    dtype = np.dtype(NUMPY_TYPES[weight.element_type])
    path = folder / weight.location
    return np.memmap(path, dtype, "r", weight.offset, (weight.num_bytes // dtype.itemsize,))
