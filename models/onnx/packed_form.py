"""PackedForm: what is left of an ONNX graph where its products are ours, too. Reads headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowtide.models.onnx.config import OnnxConfig
from lowtide.models.onnx.graph import OnnxGraph
from lowtide.models.onnx.products import Products
from lowtide.models.onnx.spec import GraphPorts, OnnxSpec
from lowtide.models.onnx.swapped.attention_node import NotSwapped
from lowtide.models.onnx.swapped.product_nodes import read_product_nodes
from lowtide.models.onnx.swapped.swap import Swap, swap_attention

ALIGNMENT = 64
"""Every matrix begins on such a byte of the panels' file, behind as many bytes that say what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedForm:
    """The nodes and matrices that become ours, and what onnxruntime still has of weights.

    `copied_bytes` and `copying_bytes` are as `ModelSpec` has them, of what is left to onnxruntime.
    """

    swap: Swap
    left_bytes: int
    copied_bytes: int
    copying_bytes: int
    unpacked_bytes: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each matrix begins in the panels' file, and where that ends."""
        places = [ALIGNMENT]
        for matrix in self.swap.products.matrices:
            places.append(-(-(places[-1] + matrix.num_bytes) // ALIGNMENT) * ALIGNMENT)
        return tuple(places)


def read_packed_form(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> PackedForm:
    """Return what is swapped; raises `NotSwapped` where the graph is left whole, or has none."""
    swap = swap_attention(graph, ports, config, read_product_nodes(graph))
    if not swap.products.products:
        raise NotSwapped("has no product of 4- or 8-bit weights in blocks of 32 that can be packed")
    left = Products(graph, ports.logits, swap.nodes)
    return PackedForm(
        swap=swap,
        left_bytes=sum(graph.weights[name].num_bytes for name in swap.weights),
        copied_bytes=left.packed_bytes - left.released_bytes,
        copying_bytes=left.largest_copy_bytes,
        unpacked_bytes=left.unpacked_bytes,
    )


def packed_spec(spec: OnnxSpec, form: PackedForm) -> OnnxSpec:
    """Return the spec of the graph whose products are ours, too."""
    return replace(
        spec,
        swap=form.swap,
        weight_bytes=form.left_bytes + form.offsets[-1],
        file_bytes=form.left_bytes + form.offsets[-1],
        copied_bytes=form.copied_bytes + form.swap.inline_bytes,
        copying_bytes=form.copying_bytes,
        unpacked_bytes=form.unpacked_bytes,
        packed_tensors=tuple(node.output for node in form.swap.products.products),
    )
