"""The matrix products of a graph, and what onnxruntime makes of their weights. Reads no weights."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from lowtide.models.onnx.graph import Node, OnnxGraph

QUANTISED = ("com.microsoft", "MatMulNBits")
PLAIN = frozenset({"MatMul", "Gemm"})
PACKED_BITS = (4, 8)
PACKED_BLOCKS = (16, 32, 64, 128, 256)
INT8_ROWS = 4
"""The accuracy level that 8-bit weights have kernels for."""
BLOCK_BYTES = 8
"""A packed block's scale and sum, both of f32."""
PACKED_PADDING = 16384
"""Of a product's copy: alignment, and what lies idle between copies."""
PACKED_SHARE = 1.35
"""Bytes of a packed copy for each byte of quantised weights at most, where the kernels are not known."""
CPUINFO = Path("/proc/cpuinfo")


class Products:
    """What is told of a graph's products.

    onnxruntime copies a product's weights into a layout of its own (`packed_bytes` in all), and lets go of
    those that nothing else reads (`released_bytes`); making a copy takes as much again. Quantised ones
    without a kernel for that are unpacked in each pass, of which `unpacked_bytes` is the largest.
    With `nodes`, of those alone: what else reads their weights is not run.
    """

    def __init__(self, graph: OnnxGraph, logits: str, nodes: frozenset[int] | None = None) -> None:
        self._graph = graph
        types = Counter[str]()
        self.packed_bytes = self.released_bytes = self.largest_copy_bytes = 0
        self.unpacked_bytes = self.widest = 0
        run = [node for i, node in enumerate(graph.nodes) if nodes is None or i in nodes]
        self._num_readers = Counter(name for node in run for name in node.inputs)
        for node in run:
            if (node.domain, node.kind) == QUANTISED:
                self._quantised(node, types, is_last=logits in node.outputs)
            elif node.kind in PLAIN:
                self._plain(node, types, is_last=logits in node.outputs)
        self.quantisation = types.most_common(1)[0][0] if types else "none"
        self.widest = self.widest or 1

    def _quantised(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        bits = int(node.numbers.get("bits", 4))
        rows, columns = (int(node.numbers.get(name, 0)) for name in ("N", "K"))
        read = [self._graph.weights[n] for n in node.inputs[1:4] if n in self._graph.weights]
        num_bytes = sum(weight.num_bytes for weight in read)
        types[f"int{bits}"] += num_bytes
        if self._has_kernel(node, bits):
            block = int(node.numbers["block_size"])
            packed_block = block * bits // 8 + BLOCK_BYTES
            copy = rows * -(-columns // block) * packed_block + PACKED_PADDING
            copy += self._widened_bytes(node)
            self.packed_bytes += copy
            self.largest_copy_bytes = max(self.largest_copy_bytes, copy)
            self.released_bytes += sum(
                weight.num_bytes
                for weight in read
                if weight.location is not None and self._num_readers[weight.name] == 1
            )
        else:
            self.packed_bytes += int(PACKED_SHARE * num_bytes)
            self.unpacked_bytes = max(self.unpacked_bytes, 4 * rows * columns)
        if not is_last:
            self.widest = max(self.widest, rows)

    def _widened_bytes(self, node: Node) -> int:
        """Return what scales of two bytes take beside the copy: they are kept as f32, too."""
        scales = self._graph.weights.get(node.input(2))
        if scales is None or scales.element_type != "float16":
            return 0
        return 2 * scales.num_bytes

    def _has_kernel(self, node: Node, bits: int) -> bool:
        """Whether onnxruntime multiplies the packed weights as they are (MLAS, "qnbitgemm")."""
        zeros = self._graph.weights.get(node.input(3))
        return (
            _has_avx2()
            and node.numbers.get("block_size") in PACKED_BLOCKS
            and bits in PACKED_BITS
            and (bits == 4 or node.numbers.get("accuracy_level") == INT8_ROWS)
            and (not node.input(3) or (zeros is not None and zeros.element_type == "uint8"))
            and not node.input(4)
        )

    def _plain(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        weight = self._graph.weights.get(node.input(1))
        if weight is None or len(weight.shape) != 2:
            return
        types[weight.element_type] += weight.num_bytes
        self.packed_bytes += weight.num_bytes * 5 // 4
        if not is_last:
            self.widest = max(self.widest, *weight.shape)


def _has_avx2() -> bool:
    """Whether the processor is known to have what kernels want; others are planned without them."""
    try:
        return re.search(r"^flags\b.*\bavx2\b", CPUINFO.read_text(), re.MULTILINE) is not None
    except OSError:
        return False
