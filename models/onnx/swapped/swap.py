"""Swap: which nodes of a graph stay when its attention, and products, are ours. Reads headers alone.

Requires the attention nodes, layer by layer. Ensures that what stays is all that the logits depend on, and
that what only attention needed (masks of lengths, caches) does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.models.onnx.attention_form import DECOMPOSED
from lowtide.models.onnx.config import OnnxConfig
from lowtide.models.onnx.graph import OnnxGraph
from lowtide.models.onnx.spec import GraphPorts
from lowtide.models.onnx.swapped.attention_node import (
    AttentionNode,
    NotSwapped,
    check_layers,
    read_attention_nodes,
)
from lowtide.models.onnx.swapped.product_nodes import ProductNodes

BRANCHES = frozenset({"If", "Loop", "Scan"})
MOST_INLINE_BYTES = 16 << 20
"""Weights inside of the .onnx file are read into memory to be given on: no more than this."""
LARGEST_HEAD = 256
NO_PRODUCTS = ProductNodes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The nodes that become ours, the places of those that stay, and the weights that these read.

    `inputs` are those of the graph that are still read, `inline_bytes` of weights inside the .onnx file.
    """

    layers: tuple[AttentionNode, ...]
    nodes: frozenset[int]
    weights: frozenset[str]
    inputs: frozenset[str]
    inline_bytes: int
    products: ProductNodes


def swap_attention(
    graph: OnnxGraph,
    ports: GraphPorts,
    config: OnnxConfig,
    products: ProductNodes = NO_PRODUCTS,
) -> Swap:
    """Return what is swapped, `products` too.

    Raises `NotSwapped` with the reason where the graph is left whole.
    """
    branch = next((node.kind for node in graph.nodes if node.kind in BRANCHES), None)
    if branch is not None:
        raise NotSwapped(f"has branches ({branch})")
    inline = sum(w.num_bytes for w in graph.weights.values() if w.location is None)
    if inline > MOST_INLINE_BYTES:
        raise NotSwapped("keeps its weights inside the .onnx file, not as external data")
    layers = read_attention_nodes(graph, config)
    if not layers:
        raise NotSwapped(f"has {DECOMPOSED}")
    check_layers(layers, ports.layers)
    _check_sizes(layers)
    reached, read = _reached(graph, ports, layers, products)
    products = products.among(reached)
    ours = {node.index for node in (*layers, *products.nodes)}
    nodes = frozenset(reached - ours)
    read -= {graph.nodes[index].outputs[0] for index in ours}
    return Swap(
        layers=layers,
        nodes=nodes,
        weights=read & frozenset(graph.weights),
        inputs=read - frozenset(graph.weights) - {n for i in nodes for n in graph.nodes[i].outputs},
        inline_bytes=inline,
        products=products,
    )


def _check_sizes(layers: tuple[AttentionNode, ...]) -> None:
    for node in layers:
        whole_groups = node.num_kv_heads > 0 and node.num_heads % node.num_kv_heads == 0
        if not whole_groups or node.head_size % 16 or node.head_size > LARGEST_HEAD:
            raise NotSwapped(
                f"has {node.num_heads} heads over {node.num_kv_heads} of size {node.head_size}"
            )


def _reached(
    graph: OnnxGraph,
    ports: GraphPorts,
    layers: tuple[AttentionNode, ...],
    products: ProductNodes,
) -> tuple[frozenset[int], frozenset[str]]:
    """The nodes that the logits depend on, ours among them, and all values that are read."""
    maker = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
    attention = {node.index for node in layers}
    ours = {node.index: node.reads for node in (*layers, *products.nodes)}
    caches = {name for node in layers for name in (*node.past, *node.present)}
    reached: set[int] = set()
    read: set[str] = set()
    wanted = [ports.logits]
    while wanted:
        name = wanted.pop()
        if name in read:
            continue
        read.add(name)
        if name in caches:
            raise NotSwapped("reads keys and values of the cache outside of attention")
        index = maker.get(name)
        if index is None or index in reached:
            continue
        reached.add(index)
        wanted += [n for n in ours.get(index, graph.nodes[index].inputs) if n]
    if not attention <= reached:
        raise NotSwapped("has attention that its logits do not depend on")
    return frozenset(reached), frozenset(read)
