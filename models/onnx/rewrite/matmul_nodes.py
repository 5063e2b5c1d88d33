"""Reads which matmuls and embedding lookups of an ONNX graph lowtide's kernels can compute.

A node with an input, attribute or shape that is not modelled here is left to onnxruntime.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

from lowtide.models.onnx.graph import Node, OnnxGraph, Weight
from lowtide.models.onnx.rewrite.block_weights import GGML_BLOCK, BlockWeights
from lowtide.models.onnx.rewrite.plan import GatherNode, MatmulNode, MatmulNodes
from lowtide.models.onnx.spec import FINGERPRINT
from lowtide.models.spec import TILE_ROWS

MATMUL = ("com.microsoft", "MatMulNBits")
GATHER = ("com.microsoft", "GatherBlockQuantized")
QUANTS, SCALES, ZEROS, GROUPS, BIAS = 1, 2, 3, 4, 5
"""MatMulNBits' inputs after the activations."""
ELEMENT_TYPES = {("uint8", "float32", None), ("uint8", "float32", "uint8")}
"""Supported element types of quants, scales and zero points; activations are then float32."""


def read_matmul_nodes(graph: OnnxGraph) -> MatmulNodes:
    """Return the matmuls with 4- and 8-bit weights that can be repacked, and lookups in the same matrices."""
    return _Reader(graph).read()


class _Reader:
    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._maker = {n: node for node in graph.nodes for n in node.outputs if n}
        self._num_readers = Counter(name for node in graph.nodes for name in node.inputs if name)
        self._offset_adders = self._read_offset_adders()
        self._matrices: dict[BlockWeights, int] = {}

    def read(self) -> MatmulNodes:
        matmuls = [
            matmul
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == MATMUL
            and (matmul := self._matmul(index, node)) is not None
        ]
        gathers = [
            gather
            for index, node in enumerate(self._graph.nodes)
            if (node.domain, node.kind) == GATHER
            and (gather := self._gather(index, node)) is not None
        ]
        return MatmulNodes(
            matrices=tuple(self._matrices), matmuls=tuple(matmuls), gathers=tuple(gathers)
        )

    def _matmul(self, index: int, node: Node) -> MatmulNode | None:
        weights = self._weights(node)
        bias = node.input(BIAS)
        if weights is None or any(node.inputs[BIAS + 1 :]):
            return None
        if bias and not self._is_bias(bias, weights.num_rows):
            return None
        adder, offsets = self._offset_adders.get(node.outputs[0], (None, None))
        if adder is not None and offsets is not None:
            if (
                weights.zeros is not None
                or weights.bits != 4
                or not _has_offset_shape(offsets, weights)
            ):
                return None
            index, weights = adder, replace(weights, offsets=offsets)
        return MatmulNode(
            index=index,
            activations=node.input(0),
            bias=bias,
            output=self._graph.nodes[index].outputs[0],
            matrix=self._matrices.setdefault(weights, len(self._matrices)),
        )

    def _weights(self, node: Node) -> BlockWeights | None:
        """Return the node's matrix; None where it cannot be repacked, or is computed by the graph."""
        quants, scales = (self._external(node.input(i)) for i in (QUANTS, SCALES))
        zeros = self._external(node.input(ZEROS))
        is_stored = quants is not None and scales is not None and not node.input(GROUPS)
        if not is_stored or bool(node.input(ZEROS)) != (zeros is not None):
            return None
        assert quants is not None and scales is not None
        rows, columns, bits, block_size = (
            int(node.numbers.get(name, 0)) for name in ("N", "K", "bits", "block_size")
        )
        bits = bits or 4
        is_whole = rows > 0 and rows % TILE_ROWS == 0 and block_size >= GGML_BLOCK
        if not is_whole or block_size % GGML_BLOCK or columns <= 0 or columns % block_size:
            return None
        is_supported = bits == 4 or (bits == 8 and zeros is None)
        blocks = columns // block_size
        has_sizes = (
            quants.num_bytes == rows * columns * bits // 8
            and prod(scales.shape) == rows * blocks
            and (zeros is None or zeros.num_bytes == rows * -(-blocks // 2))
        )
        types = (quants.element_type, scales.element_type, zeros and zeros.element_type)
        if not is_supported or not has_sizes or types not in ELEMENT_TYPES:
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

    def _gather(self, index: int, node: Node) -> GatherNode | None:
        """Return a lookup in a matrix that a matmul reads too; None for any other lookup."""
        data, scales = self._external(node.input(0)), node.input(2)
        numbers = node.numbers
        is_by_row = numbers.get("gather_axis", 0) == 0 and numbers.get("quantize_axis", 1) == 1
        if data is None or node.input(3) or not is_by_row:
            return None
        for weights, matrix in self._matrices.items():
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
                return GatherNode(index=index, ids=node.input(1), output=output, matrix=matrix)
        return None

    def _external(self, name: str) -> Weight | None:
        """Return a weight that lies in a file beside the graph."""
        weight = self._graph.weights.get(name) if name else None
        return weight if weight is not None and weight.location is not None else None

    def _is_bias(self, name: str, num_rows: int) -> bool:
        weight = self._graph.weights.get(name)
        return weight is not None and weight.shape == (num_rows,)

    def _read_offset_adders(self) -> dict[str, tuple[int, Weight]]:
        """Return the Add node and the offsets of each matmul that has offsets, by the matmul's output.

        Only `lowtide convert` writes this pattern (the sums of the activations' blocks times the offsets,
        added to the matmul), so the graph must carry its mark.
        """
        if FINGERPRINT not in self._graph.metadata:
            return {}
        adders = {}
        for index, node in enumerate(self._graph.nodes):
            if (node.domain, node.kind, len(node.inputs)) != ("", "Add", 2):
                continue
            matmul, correction = (self._maker.get(name) for name in node.inputs)
            if matmul is None or correction is None or (matmul.domain, matmul.kind) != MATMUL:
                continue
            sums = self._maker.get(correction.input(0))
            blocks = self._maker.get(sums.input(0)) if sums is not None else None
            kinds = [n.kind for n in (correction, sums, blocks) if n is not None]
            offsets = self._external(correction.input(1))
            is_correction = kinds == ["MatMul", "ReduceSum", "Reshape"] and offsets is not None
            if not is_correction or blocks is None or blocks.input(0) != matmul.input(0):
                continue
            if self._num_readers[node.inputs[0]] == 1 and offsets is not None:
                adders[node.inputs[0]] = index, offsets
        return adders


def _has_offset_shape(offsets: Weight, weights: BlockWeights) -> bool:
    shape = (weights.num_columns // weights.block_size, weights.num_rows)
    return offsets.element_type == "float32" and offsets.shape == shape
