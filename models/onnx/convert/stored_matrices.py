"""StoredMatrices: GGUF's matrices in the file beside a graph, and the nodes that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.models.onnx.convert.external_data import ExternalData
from lowtide.models.onnx.convert.gguf_blocks import ROUNDED_TYPES
from lowtide.models.onnx.convert.gguf_weights import GgufWeights
from lowtide.models.onnx.convert.graph_nodes import MICROSOFT, GraphNodes

INT8_ROWS, FLOAT_ROWS = 4, 1
"""MatMulNBits' accuracy levels: rows are rounded to 8 bits in blocks for a product, or stay float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """Where a matrix is; `offsets`, (blocks, rows), is "" where there are none."""

    name: str
    rows: int
    columns: int
    bits: int
    block_size: int
    start: int
    quants: str
    scales: str
    offsets: str

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's quants."""
        return self.columns * self.bits // 8


class StoredMatrices:
    """Writes each matrix once, slice by slice, and adds products and look-ups of rows to a graph.

    Weights with offsets take a second, small product: of the sums of a row's blocks and the offsets.
    (MatMulNBits has zero points of floating point for that; without a kernel: twenty times slower.)
    `rounded` counts the matrices that had to be rounded, by their type.
    """

    def __init__(
        self,
        nodes: GraphNodes,
        data: ExternalData,
        weights: GgufWeights,
        *,
        accuracy_level: int,
        advance: Callable[[int], None],
    ) -> None:
        self._nodes = nodes
        self._data = data
        self._weights = weights
        self._accuracy_level = accuracy_level
        self._advance = advance
        self._sums: dict[tuple[str, int], str] = {}
        self.rounded = Counter[str]()

    def store(self, name: str, heads: int = 0) -> StoredMatrix:
        """Write the matrix `name`; `heads` as for `GgufWeights.slices`."""
        import numpy as np

        type_name = self._weights.type_name(name)
        if type_name in ROUNDED_TYPES:
            self.rounded[type_name] += 1
        rows, columns = self._weights.shape(name)
        start, scales, offsets = self._data.begin(), [], []
        for part in self._weights.slices(name, heads):
            self._data.append(part.packed())
            scales.append(part.scales)
            if part.offsets is not None:
                offsets.append(part.offsets)
            self._advance(self._weights.num_bytes(name) * len(part.quants) // rows)
        bits, block_size = part.bits, part.block_size
        num_blocks = columns // block_size
        stored = self._entry(f"{name}.scales", np.concatenate(scales))
        shape = (rows, num_blocks, block_size * bits // 8)
        quants = self._nodes.weight(self._data.tensor(f"{name}.quants", shape, "uint8", start))
        transposed = self._entry(f"{name}.offsets", np.concatenate(offsets).T) if offsets else ""
        return StoredMatrix(
            name=name,
            rows=rows,
            columns=columns,
            bits=bits,
            block_size=block_size,
            start=start,
            quants=quants,
            scales=stored,
            offsets=transposed,
        )

    def table(self, name: str, numbers: object) -> str:
        """Write a table of float32; return its name."""
        return self._entry(name, numbers)

    def _entry(self, name: str, numbers: object) -> str:
        import numpy as np

        array = np.asarray(numbers, np.float32)
        start = self._data.begin()
        self._data.append(array)
        return self._nodes.weight(self._data.tensor(name, array.shape, "float32", start))

    def product(self, x: str, matrix: StoredMatrix, bias: str = "", output: str = "") -> str:
        """Add x times the matrix's rows; x is (batch, rows, columns). Return the output's name."""
        (made,) = self._nodes.add_many(
            "MatMulNBits",
            (x, matrix.quants, matrix.scales, *(("", "", bias) if bias else ())),
            ("" if matrix.offsets else output,),
            domain=MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=self._accuracy_level,
        )
        if not matrix.offsets:
            return made
        sums = self._block_sums(x, matrix.block_size)
        more = self._nodes.add("MatMul", sums, matrix.offsets)
        (summed,) = self._nodes.add_many("Add", (made, more), (output,))
        return summed

    def _block_sums(self, x: str, block_size: int) -> str:
        key = x, block_size
        if key not in self._sums:
            shape = self._nodes.constant(0, 0, -1, block_size)
            blocks = self._nodes.add("Reshape", x, shape)
            last = self._nodes.constant(-1)
            self._sums[key] = self._nodes.add("ReduceSum", blocks, last, keepdims=0)
        return self._sums[key]

    def rows(self, token_ids: str, matrix: StoredMatrix) -> str:
        """Add a look-up of rows, (batch, rows, columns) of float32."""
        flat = self._data.tensor(
            f"{matrix.name}.rows", (matrix.rows, matrix.row_bytes), "uint8", matrix.start
        )
        found = self._nodes.add(
            "GatherBlockQuantized",
            self._nodes.weight(flat),
            token_ids,
            matrix.scales,
            domain=MICROSOFT,
            bits=matrix.bits,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return self._with_offsets(found, token_ids, matrix) if matrix.offsets else found

    def _with_offsets(self, found: str, token_ids: str, matrix: StoredMatrix) -> str:
        nodes = self._nodes
        offsets = nodes.add("Gather", matrix.offsets, token_ids, axis=1)
        by_row = nodes.add("Transpose", offsets, perm=[1, 2, 0])
        apart = nodes.add("Unsqueeze", by_row, nodes.constant(-1))
        blocks = nodes.add("Reshape", found, nodes.constant(0, 0, -1, matrix.block_size))
        summed = nodes.add("Add", blocks, apart)
        return nodes.add("Reshape", summed, nodes.constant(0, 0, matrix.columns))
