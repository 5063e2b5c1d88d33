"""Reads the attention nodes of an ONNX graph: which operator a graph uses, and what each node computes.

A node with an input or attribute that is not modelled here raises `CannotRewrite`: lowtide's attention must
not replace it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowtide.models.onnx.config import OnnxConfig
from lowtide.models.onnx.graph import Node, OnnxGraph
from lowtide.models.onnx.rewrite.plan import AttentionNode, CannotRewrite
from lowtide.models.onnx.spec import GraphPorts, LayerPorts

OPERATORS = {
    ("com.microsoft", "GroupQueryAttention"): "GroupQueryAttention",
    ("com.microsoft", "MultiHeadAttention"): "MultiHeadAttention",
    ("", "Attention"): "Attention",
}
DECOMPOSED = "decomposed attention"
SHARING = "GroupQueryAttention"
_PAST, _PRESENT = (3, 4), (1, 2)
"""GroupQueryAttention's inputs and outputs of keys and values."""


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """The attention operator of most layers.

    `shares_cache` is true where every layer appends to its past keys and values in place.
    """

    name: str
    shares_cache: bool


def attention_form(graph: OnnxGraph, ports: GraphPorts) -> AttentionForm:
    """Return the graph's attention operator; a graph without one has decomposed attention."""
    kinds = Counter(
        OPERATORS[node.domain, node.kind]
        for node in graph.nodes
        if (node.domain, node.kind) in OPERATORS
    )
    name = kinds.most_common(1)[0][0] if kinds else DECOMPOSED
    shared = {
        (node.input(past), node.outputs[present])
        for node in graph.nodes
        if OPERATORS.get((node.domain, node.kind)) == SHARING
        for past, present in zip(_PAST, _PRESENT, strict=True)
        if present < len(node.outputs)
    }
    caches = {
        pair for layer in ports.layers for pair in zip(layer.past, layer.present, strict=True)
    }
    return AttentionForm(name, caches <= shared)


def read_attention_nodes(graph: OnnxGraph, config: OnnxConfig) -> tuple[AttentionNode, ...]:
    """Return the attention nodes in the graph's order; raise `CannotRewrite` for an unsupported one."""
    nodes = []
    for index, node in enumerate(graph.nodes):
        reader = _READERS.get((node.domain, node.kind))
        if reader is not None:
            nodes.append(reader(index, node, graph, config))
    return tuple(nodes)


def check_layers(nodes: tuple[AttentionNode, ...], layers: tuple[LayerPorts, ...]) -> None:
    """Raise `CannotRewrite` unless there is one node a layer, in order, each with that layer's cache."""
    if len(nodes) != len(layers):
        raise CannotRewrite(f"has {len(nodes)} attention operators for {len(layers)} layers")
    for node, ports in zip(nodes, layers, strict=True):
        if node.past != ports.past or node.present != ports.present:
            raise CannotRewrite(f"does not pass {ports.past[0]} directly to its layer's attention")


def _group_query(index: int, node: Node, graph: OnnxGraph, config: OnnxConfig) -> AttentionNode:
    """Read com.microsoft.GroupQueryAttention: causal, with a cache; rotary embedding and packing optional."""
    _require_at_most(node, inputs=9, outputs=3)
    _require_unset(node, "smooth_softmax", "qk_output", "kv_cache_bit_width")
    has_rotary = bool(node.numbers.get("do_rotary", 0))
    cosines, sines = (node.input(7), node.input(8)) if has_rotary else ("", "")
    if has_rotary and not {cosines, sines} <= set(graph.weights):
        raise CannotRewrite("computes its rotary embedding's cosines and sines")
    window = int(node.numbers.get("local_window_size", -1))
    return AttentionNode(
        **_common(index, node, config, (0, 1, 2), (3, 4)),
        bias="",
        cosines=cosines,
        sines=sines,
        is_interleaved=bool(node.numbers.get("rotary_interleaved", 0)),
        num_heads=int(node.numbers.get("num_heads", 0)),
        num_kv_heads=int(node.numbers.get("kv_num_heads", 0)),
        is_causal=True,
        window=window if window > 0 else None,
    )


def _multi_head(index: int, node: Node, graph: OnnxGraph, config: OnnxConfig) -> AttentionNode:
    """Read com.microsoft.MultiHeadAttention with separate inputs and a bias that hides keys."""
    _require_at_most(node, inputs=8, outputs=3)
    if node.input(3) or node.input(4) or not node.input(1):
        raise CannotRewrite("has MultiHeadAttention with packed inputs, biases or a padding mask")
    num_heads = int(node.numbers.get("num_heads", 0))
    return AttentionNode(
        **_common(index, node, config, (0, 1, 2), (6, 7)),
        bias=node.input(5),
        cosines="",
        sines="",
        is_interleaved=False,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        is_causal=bool(node.numbers.get("unidirectional", 0)),
        window=None,
    )


def _standard(index: int, node: Node, graph: OnnxGraph, config: OnnxConfig) -> AttentionNode:
    """Read the standard Attention operator (opset 23) with inputs of three dimensions."""
    _require_at_most(node, inputs=6, outputs=3)
    num_heads = int(node.numbers.get("q_num_heads", 0))
    if not num_heads:
        raise CannotRewrite("has Attention over inputs of four dimensions")
    return AttentionNode(
        **_common(index, node, config, (0, 1, 2), (4, 5)),
        bias=node.input(3),
        cosines="",
        sines="",
        is_interleaved=False,
        num_heads=num_heads,
        num_kv_heads=int(node.numbers.get("kv_num_heads", 0)),
        is_causal=bool(node.numbers.get("is_causal", 0)),
        window=None,
    )


_READERS: dict[
    tuple[str, str], Callable[[int, Node, OnnxGraph, OnnxConfig], AttentionNode]
] = {
    ("com.microsoft", "GroupQueryAttention"): _group_query,
    ("com.microsoft", "MultiHeadAttention"): _multi_head,
    ("", "Attention"): _standard,
}  # fmt: skip


def _common(
    index: int,
    node: Node,
    config: OnnxConfig,
    inputs: tuple[int, int, int],
    past: tuple[int, int],
) -> dict[str, Any]:
    query, key, value = (node.input(i) for i in inputs)
    if bool(key) != bool(value) or len(node.outputs) < 3:
        raise CannotRewrite(f"has {node.kind} without a cache, or with keys but no values")
    scale = float(node.numbers.get("scale", 0))
    return {
        "index": index,
        "query": query,
        "key": key,
        "value": value,
        "output": node.outputs[0],
        "head_dim": config.head_size,
        "scale": scale or config.head_size**-0.5,
        "softcap": float(node.numbers.get("softcap", 0)),
        "past": (node.input(past[0]), node.input(past[1])),
        "present": (node.outputs[1], node.outputs[2]),
    }


def _require_at_most(node: Node, *, inputs: int, outputs: int) -> None:
    if any(node.inputs[inputs:]) or any(node.outputs[outputs:]):
        raise CannotRewrite(f"has {node.kind} with unsupported inputs or outputs")


def _require_unset(node: Node, *attributes: str) -> None:
    for name in attributes:
        if node.numbers.get(name, 0) > 0:
            raise CannotRewrite(f"has {node.kind} with {name}")
