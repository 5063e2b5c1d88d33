"""The matrix products of a graph, and what onnxruntime makes of their weights. Reads no weights."""

from __future__ import annotations

from collections import Counter

from lowtide.models.onnx.graph import Node, OnnxGraph

QUANTISED = ("com.microsoft", "MatMulNBits")
PLAIN = frozenset({"MatMul", "Gemm"})
PACKED_BITS = (4, 8)
PACKED_BLOCKS = (16, 32, 64, 128, 256)
PACKED_SHARE = 1.35
"""Bytes of a packed copy for each byte of quantised weights: scales and sums of blocks become f32."""


class Products:
    """What is told of a graph's products.

    onnxruntime copies a product's weights into a layout of its own (`packed_bytes` in all); quantised ones
    without a kernel for that are unpacked in each pass, of which `unpacked_bytes` is the largest.
    """

    def __init__(self, graph: OnnxGraph, logits: str) -> None:
        self._graph = graph
        types = Counter[str]()
        self.packed_bytes = self.unpacked_bytes = self.widest = 0
        for node in graph.nodes:
            if (node.domain, node.kind) == QUANTISED:
                self._quantised(node, types, is_last=logits in node.outputs)
            elif node.kind in PLAIN:
                self._plain(node, types, is_last=logits in node.outputs)
        self.quantisation = types.most_common(1)[0][0] if types else "none"
        self.widest = self.widest or 1

    def _quantised(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        bits = int(node.numbers.get("bits", 4))
        rows, columns = (int(node.numbers.get(name, 0)) for name in ("N", "K"))
        num_bytes = sum(
            self._graph.weights[name].num_bytes
            for name in node.inputs[1:4]
            if name in self._graph.weights
        )
        types[f"int{bits}"] += num_bytes
        self.packed_bytes += int(PACKED_SHARE * num_bytes)
        self.unpacked_bytes = max(self.unpacked_bytes, 4 * rows * columns)
        if not is_last:
            self.widest = max(self.widest, rows)

    def _plain(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        weight = self._graph.weights.get(node.input(1))
        if weight is None or len(weight.shape) != 2:
            return
        types[weight.element_type] += weight.num_bytes
        self.packed_bytes += weight.num_bytes * 5 // 4
        if not is_last:
            self.widest = max(self.widest, *weight.shape)
