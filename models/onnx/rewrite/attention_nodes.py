"""AttentionNode: what a graph's attention node attends to and how, for attention in its place.

Requires nothing. Ensures that a node which is read says everything: what it says beside is `CannotRewrite`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowtide.models.onnx.config import OnnxConfig
from lowtide.models.onnx.graph import Node, OnnxGraph
from lowtide.models.onnx.spec import LayerPorts


class CannotRewrite(Exception):
    """A graph that is left whole, and why: in words that follow "its graph"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNode:
    """One node, of all layers in a row; names are of values in the graph, "" where there is none.

    With no `key` and no `value`, `query` is all three, packed. `bias` is added to scores and hides keys.
    `cosines` and `sines` are weights, (positions, pairs), that turn queries and keys. A causal node's
    rows see the `window` last keys, their own among them, or all. `past` and `present` are its cache.
    """

    index: int
    query: str
    key: str
    value: str
    bias: str
    output: str
    cosines: str
    sines: str
    is_interleaved: bool
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    softcap: float
    is_causal: bool
    window: int | None
    past: tuple[str, str]
    present: tuple[str, str]

    @property
    def is_repacked_file(self) -> bool:
        """Whether queries, keys and values come side by side."""
        return not self.key

    @property
    def width(self) -> int:
        """The channels of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """The channels of all key heads."""
        return self.num_kv_heads * self.head_size

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that the graph has to make for it."""
        return tuple(n for n in (self.query, self.key, self.value, self.bias) if n)


def read_attention_nodes(graph: OnnxGraph, config: OnnxConfig) -> tuple[AttentionNode, ...]:
    """Return the attention nodes in the graph's order; raises `CannotRewrite` where one is not known."""
    found = []
    for index, node in enumerate(graph.nodes):
        reader = _READERS.get((node.domain, node.kind))
        if reader is not None:
            found.append(reader(index, node, graph, config))
    return tuple(found)


def check_layers(nodes: tuple[AttentionNode, ...], layers: tuple[LayerPorts, ...]) -> None:
    """Raise `CannotRewrite` unless the nodes are those of the layers, in order, each with its own cache."""
    if len(nodes) != len(layers):
        raise CannotRewrite(f"has {len(nodes)} attention operators for {len(layers)} layers")
    for node, ports in zip(nodes, layers, strict=True):
        if node.past != ports.past or node.present != ports.present:
            raise CannotRewrite(f"does not give {ports.past[0]} straight to its layer's attention")


def _group_query(index: int, node: Node, graph: OnnxGraph, config: OnnxConfig) -> AttentionNode:
    """com.microsoft.GroupQueryAttention: causal, with a cache, rotary inside or not, packed or not."""
    _only(node, inputs=9, outputs=3)
    _without(node, "smooth_softmax", "qk_output", "kv_cache_bit_width")
    turns = bool(node.numbers.get("do_rotary", 0))
    cosines, sines = (node.input(7), node.input(8)) if turns else ("", "")
    if turns and not {cosines, sines} <= set(graph.weights):
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
    """com.microsoft.MultiHeadAttention of three inputs, with a bias that hides keys."""
    _only(node, inputs=8, outputs=3)
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
    """The standard Attention operator (opset 23) of inputs of three dimensions."""
    _only(node, inputs=6, outputs=3)
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
        raise CannotRewrite(f"has {node.kind} without a cache, or with keys and no values")
    scale = float(node.numbers.get("scale", 0))
    return {
        "index": index,
        "query": query,
        "key": key,
        "value": value,
        "output": node.outputs[0],
        "head_size": config.head_size,
        "scale": scale or config.head_size**-0.5,
        "softcap": float(node.numbers.get("softcap", 0)),
        "past": (node.input(past[0]), node.input(past[1])),
        "present": (node.outputs[1], node.outputs[2]),
    }


def _only(node: Node, *, inputs: int, outputs: int) -> None:
    if any(node.inputs[inputs:]) or any(node.outputs[outputs:]):
        raise CannotRewrite(f"has {node.kind} with inputs or outputs that are not known here")


def _without(node: Node, *attributes: str) -> None:
    for name in attributes:
        if node.numbers.get(name, 0) > 0:
            raise CannotRewrite(f"has {node.kind} with {name}")
