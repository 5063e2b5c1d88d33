"""MatmulNodes: which of a graph's products our kernels can compute, and of which matrices.

Requires nothing. Ensures that a node that is named here says everything: others stay onnxruntime's.

BlockWeights: a graph's quantised matrix, and its rows in ggml's blocks. Knows no operator of ours.

MatMulNBits (onnxruntime, "Contrib operators") keeps a matrix as quants of 4 or 8 bits with a scale, and a
zero point or not, for every block of columns; ggml's Q4_0, Q4_1 and Q8_0 say the same with numbers of two
bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import BadModelFile
from lowtide.models.onnx.graph import Node, OnnxGraph, Weight
from lowtide.models.onnx.spec import FINGERPRINT

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
            f"{name} has a scale, or a minimum, beyond what two bytes hold: leave --repack out"
        )
    return halves.view(np.uint8).reshape(*halves.shape, 2)


def _mapped(folder: Path, weight: Weight) -> NDArray[Any]:
    """A weight's elements in a row, mapped from its file."""
    import numpy as np

    assert weight.location is not None, "it lies beside the graph"
    dtype = np.dtype(ELEMENTS[weight.element_type])
    path = folder / weight.location
    return np.memmap(path, dtype, "r", weight.offset, (weight.num_bytes // dtype.itemsize,))


TILE_ROWS = 16
"""Rows of a matrix that are packed together (`attention/native/products/packed_matrix.h`)."""
PRODUCT = ("com.microsoft", "MatMulNBits")
LOOK_UP = ("com.microsoft", "GatherBlockQuantized")
QUANTS, SCALES, ZEROS, GROUPS, BIAS = 1, 2, 3, 4, 5
"""MatMulNBits' inputs after the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulNode:
    """A product of `rows` by matrix number `matrix`; `index` is the node's that makes `output` today."""

    index: int
    rows: str
    bias: str
    output: str
    matrix: int

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the graph has to make for it."""
        return (self.rows, self.bias) if self.bias else (self.rows,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherNode:
    """Rows of matrix number `matrix`, by their numbers in `ids`."""

    index: int
    ids: str
    output: str
    matrix: int

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the graph has to make for it."""
        return (self.ids,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulNodes:
    """The nodes in the graph's order, and the matrices that they read."""

    matrices: tuple[BlockWeights, ...] = ()
    products: tuple[MatmulNode, ...] = ()
    gathers: tuple[GatherNode, ...] = ()

    @property
    def nodes(self) -> tuple[MatmulNode | GatherNode, ...]:
        """All of them."""
        return (*self.products, *self.gathers)

    def among(self, indices: Set[int]) -> MatmulNodes:
        """Return those whose index is among `indices`; matrices keep their numbers."""
        return replace(
            self,
            products=tuple(node for node in self.products if node.index in indices),
            gathers=tuple(node for node in self.gathers if node.index in indices),
        )


def read_matmul_nodes(graph: OnnxGraph) -> MatmulNodes:
    """Return the products of 4- and 8-bit weights that have a packed form, and look-ups in the same."""
    return _Reader(graph).found()


class _Reader:
    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._maker = {n: node for node in graph.nodes for n in node.outputs if n}
        self._num_readers = Counter(name for node in graph.nodes for name in node.inputs if name)
        self._adders = self._found_adders()
        self._matrices: dict[BlockWeights, int] = {}

    def found(self) -> MatmulNodes:
        products = [
            made
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == PRODUCT
            and (made := self._product(index, node)) is not None
        ]
        gathers = [
            found
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == LOOK_UP
            and (found := self._look_up(index, node)) is not None
        ]
        return MatmulNodes(
            matrices=tuple(self._matrices), products=tuple(products), gathers=tuple(gathers)
        )

    def _product(self, index: int, node: Node) -> MatmulNode | None:
        weights = self._weights(node)
        bias = node.input(BIAS)
        if weights is None or any(node.inputs[BIAS + 1 :]):
            return None
        if bias and not self._is_bias(bias, weights.num_rows):
            return None
        adder, offsets = self._adders.get(node.outputs[0], (None, None))
        if adder is not None and offsets is not None:
            if weights.zeros is not None or weights.bits != 4 or not _suits(offsets, weights):
                return None
            index, weights = adder, replace(weights, offsets=offsets)
        return MatmulNode(
            index=index,
            rows=node.input(0),
            bias=bias,
            output=self._graph.nodes[index].outputs[0],
            matrix=self._matrices.setdefault(weights, len(self._matrices)),
        )

    def _weights(self, node: Node) -> BlockWeights | None:
        """What the node multiplies by; None where that has no packed form, or is computed."""
        quants, scales = (self._beside(node.input(i)) for i in (QUANTS, SCALES))
        zeros = self._beside(node.input(ZEROS))
        is_stated = quants is not None and scales is not None and not node.input(GROUPS)
        if not is_stated or bool(node.input(ZEROS)) != (zeros is not None):
            return None
        assert quants is not None and scales is not None
        rows, columns, bits, block_size = (
            int(node.numbers.get(name, 0)) for name in ("N", "K", "bits", "block_size")
        )
        bits = bits or 4
        is_whole = rows > 0 and rows % TILE_ROWS == 0 and block_size >= BLOCK_SIZE
        if not is_whole or block_size % BLOCK_SIZE or columns <= 0 or columns % block_size:
            return None
        is_known = bits == 4 or (bits == 8 and zeros is None)
        blocks = columns // block_size
        has_sizes = (
            quants.num_bytes == rows * columns * bits // 8
            and prod(scales.shape) == rows * blocks
            and (zeros is None or zeros.num_bytes == rows * -(-blocks // 2))
        )
        types = (quants.element_type, scales.element_type, zeros and zeros.element_type)
        if not is_known or not has_sizes or types not in _TYPES:
            return None
        return BlockWeights(
            num_rows=rows,
            num_columns=columns,
            bits=bits,
            block_size=block_size,
            quants=quants,
            scales=scales,
            zeros=zeros,
        )

    def _look_up(self, index: int, node: Node) -> GatherNode | None:
        """A look-up of rows in a matrix that is multiplied by, too."""
        data, scales = self._beside(node.input(0)), node.input(2)
        numbers = node.numbers
        is_by_row = numbers.get("gather_axis", 0) == 0 and numbers.get("quantize_axis", 1) == 1
        if data is None or node.input(3) or not is_by_row:
            return None
        for weights, place in self._matrices.items():
            quants = weights.quants
            is_same = (quants.location, quants.offset, quants.num_bytes) == (
                data.location, data.offset, data.num_bytes,
            )  # fmt: skip
            shape = int(numbers.get("bits", 4)), int(numbers.get("block_size", 128))
            is_plain = weights.zeros is None and weights.offsets is None
            if is_same and is_plain and scales == weights.scales.name:
                if shape != (weights.bits, weights.block_size):
                    return None
                output = node.outputs[0]
                return GatherNode(index=index, ids=node.input(1), output=output, matrix=place)
        return None

    def _beside(self, name: str) -> Weight | None:
        """A weight that lies in a file beside the graph."""
        weight = self._graph.weights.get(name) if name else None
        return weight if weight is not None and weight.location is not None else None

    def _is_bias(self, name: str, num_rows: int) -> bool:
        weight = self._graph.weights.get(name)
        return weight is not None and weight.shape == (num_rows,)

    def _found_adders(self) -> dict[str, tuple[int, Weight]]:
        """For products whose offsets are added by a second one, as `lowtide convert` writes them: the index
        of the node that adds, and the offsets. Of other graphs none: their shapes are not known here."""
        if FINGERPRINT not in self._graph.metadata:
            return {}
        found = {}
        for index, node in enumerate(self._graph.nodes):
            if (node.domain, node.kind, len(node.inputs)) != ("", "Add", 2):
                continue
            product, more = (self._maker.get(name) for name in node.inputs)
            if product is None or more is None or (product.domain, product.kind) != PRODUCT:
                continue
            sums = self._maker.get(more.input(0))
            blocks = self._maker.get(sums.input(0)) if sums is not None else None
            kinds = [n.kind for n in (more, sums, blocks) if n is not None]
            offsets = self._beside(more.input(1))
            is_of_blocks = kinds == ["MatMul", "ReduceSum", "Reshape"] and offsets is not None
            if not is_of_blocks or blocks is None or blocks.input(0) != product.input(0):
                continue
            if self._num_readers[node.inputs[0]] == 1 and offsets is not None:
                found[node.inputs[0]] = index, offsets
        return found


_TYPES = {("uint8", "float32", None), ("uint8", "float32", "uint8")}
"""Element types of quants, scales and zero points: rows are float32 then."""


def _suits(offsets: Weight, weights: BlockWeights) -> bool:
    shape = (weights.num_columns // weights.block_size, weights.num_rows)
    return offsets.element_type == "float32" and offsets.shape == shape
