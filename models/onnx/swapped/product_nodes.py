"""ProductNodes: which of a graph's products our kernels can compute, and of which matrices.

Requires nothing. Ensures that a node that is named here says everything: others stay onnxruntime's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace
from math import prod

from lowtide.models.onnx.graph import Node, OnnxGraph, Weight
from lowtide.models.onnx.spec import FINGERPRINT
from lowtide.models.onnx.swapped.block_weights import BLOCK_SIZE, BlockWeights

PANEL_ROWS = 16
"""Rows of a matrix that are packed together (`attention/native/products/packed_matrix.h`)."""
PRODUCT = ("com.microsoft", "MatMulNBits")
LOOK_UP = ("com.microsoft", "GatherBlockQuantized")
QUANTS, SCALES, ZEROS, GROUPS, BIAS = 1, 2, 3, 4, 5
"""MatMulNBits' inputs after the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductNode:
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
class LookUpNode:
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
class ProductNodes:
    """The nodes in the graph's order, and the matrices that they read."""

    matrices: tuple[BlockWeights, ...] = ()
    products: tuple[ProductNode, ...] = ()
    look_ups: tuple[LookUpNode, ...] = ()

    @property
    def nodes(self) -> tuple[ProductNode | LookUpNode, ...]:
        """All of them."""
        return (*self.products, *self.look_ups)

    def among(self, indices: Set[int]) -> ProductNodes:
        """Return those whose index is among `indices`; matrices keep their numbers."""
        return replace(
            self,
            products=tuple(node for node in self.products if node.index in indices),
            look_ups=tuple(node for node in self.look_ups if node.index in indices),
        )


def read_product_nodes(graph: OnnxGraph) -> ProductNodes:
    """Return the products of 4- and 8-bit weights that have a packed form, and look-ups in the same."""
    return _Reader(graph).found()


class _Reader:
    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._maker = {n: node for node in graph.nodes for n in node.outputs if n}
        self._num_readers = Counter(name for node in graph.nodes for name in node.inputs if name)
        self._adders = self._found_adders()
        self._matrices: dict[BlockWeights, int] = {}

    def found(self) -> ProductNodes:
        products = [
            made
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == PRODUCT
            and (made := self._product(index, node)) is not None
        ]
        look_ups = [
            found
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == LOOK_UP
            and (found := self._look_up(index, node)) is not None
        ]
        return ProductNodes(
            matrices=tuple(self._matrices), products=tuple(products), look_ups=tuple(look_ups)
        )

    def _product(self, index: int, node: Node) -> ProductNode | None:
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
        return ProductNode(
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
        is_whole = rows > 0 and rows % PANEL_ROWS == 0 and block_size >= BLOCK_SIZE
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

    def _look_up(self, index: int, node: Node) -> LookUpNode | None:
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
                return LookUpNode(index=index, ids=node.input(1), output=output, matrix=place)
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
