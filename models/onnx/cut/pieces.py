"""Pieces: which nodes of a graph run between which attention nodes. Reads headers alone.

Requires a graph in topological order and its attention nodes, layer by layer. Ensures that each node
that the logits depend on is in the first piece that has everything it reads; that the pieces run one
after the other, the attention of layer i after piece i; and that what only attention needed (masks of
lengths, caches) is in none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowtide.models.onnx.attention_form import DECOMPOSED
from lowtide.models.onnx.config import OnnxConfig
from lowtide.models.onnx.cut.attention_node import (
    AttentionNode,
    NotCut,
    check_layers,
    read_attention_nodes,
)
from lowtide.models.onnx.graph import OnnxGraph
from lowtide.models.onnx.spec import GraphPorts

CONSTANT = "Constant"
BRANCHES = frozenset({"If", "Loop", "Scan"})
MOST_INLINE_BYTES = 16 << 20
"""Weights inside of the .onnx file are read into memory to be given to the pieces: no more than this."""
LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Nodes by their place in the graph, the weights they read, and the values that come in and go out."""

    nodes: tuple[int, ...]
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A graph cut at its attention: one piece more than layers.

    `repeated_bytes` are of weights that more than one piece reads, once for each piece but the first,
    `inline_bytes` of those inside the .onnx file.
    """

    layers: tuple[AttentionNode, ...]
    pieces: tuple[Piece, ...]
    repeated_bytes: int
    inline_bytes: int


def cut_graph(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> Cut:
    """Return how the graph is cut; raises `NotCut` with the reason where it is left whole."""
    branch = next((node.kind for node in graph.nodes if node.kind in BRANCHES), None)
    if branch is not None:
        raise NotCut(f"has branches ({branch})")
    inline = sum(w.num_bytes for w in graph.weights.values() if w.location is None)
    if inline > MOST_INLINE_BYTES:
        raise NotCut("keeps its weights inside the .onnx file, not as external data")
    layers = read_attention_nodes(graph, config)
    if not layers:
        raise NotCut(f"has {DECOMPOSED}")
    check_layers(layers, ports.layers)
    _check_sizes(layers)
    pieces = _Stages(graph, ports, layers).pieces()
    return Cut(
        layers=layers,
        pieces=pieces,
        repeated_bytes=_repeated(graph, pieces),
        inline_bytes=inline,
    )


def _check_sizes(layers: tuple[AttentionNode, ...]) -> None:
    for node in layers:
        whole_groups = node.num_kv_heads > 0 and node.num_heads % node.num_kv_heads == 0
        if not whole_groups or node.head_size % 16 or node.head_size > LARGEST_HEAD:
            raise NotCut(
                f"has {node.num_heads} heads over {node.num_kv_heads} of size {node.head_size}"
            )


class _Stages:
    """After how many attention nodes each value is there."""

    def __init__(
        self, graph: OnnxGraph, ports: GraphPorts, layers: tuple[AttentionNode, ...]
    ) -> None:
        self._graph = graph
        self._layers = layers
        self._logits = ports.logits
        self._maker = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
        self._attention = {node.index: i for i, node in enumerate(layers)}
        self._caches = {name for node in layers for name in (*node.past, *node.present)}
        self._live = self._reached([ports.logits, *(n for node in layers for n in node.reads)])
        self._stage_of: dict[int, int] = {}
        for index in sorted(self._live):
            self._stage_of[index] = self._stage(index, graph.nodes[index].inputs)
        for layer, node in enumerate(layers):
            if self._stage(node.index, node.reads) != layer:
                raise NotCut("has attention that does not follow on the layer before")

    def _reached(self, wanted: list[str]) -> set[int]:
        """The nodes that make the wanted values, up to attention."""
        reached: set[int] = set()
        while wanted:
            name = wanted.pop()
            if name in self._caches:
                raise NotCut("reads keys and values of the cache outside of attention")
            index = self._maker.get(name)
            if index is None or index in reached or index in self._attention:
                continue
            reached.add(index)
            wanted += [read for read in self._graph.nodes[index].inputs if read]
        return reached

    def _stage(self, index: int, reads: Iterable[str]) -> int:
        stages = [0]
        for name in reads:
            maker = self._maker.get(name)
            if maker is None:
                continue
            if maker >= index:
                raise NotCut("is not in topological order")
            layer = self._attention.get(maker)
            stages.append(self._stage_of[maker] if layer is None else layer + 1)
        return max(stages)

    def pieces(self) -> tuple[Piece, ...]:
        """Return the pieces in order."""
        num_pieces = len(self._layers) + 1
        if self._stage_of.get(self._maker[self._logits]) != num_pieces - 1:
            raise NotCut("makes its logits before the last layer")
        members: list[set[int]] = [set() for _ in range(num_pieces)]
        for index, stage in self._stage_of.items():
            if not self._is_constant(index):
                members[stage].add(index)
        wanted = [set(node.reads) for node in self._layers] + [{self._logits}]
        crossing = [self._read_of(member) for member in members]
        for names in crossing:
            for name in names:
                maker = self._maker.get(name)
                if maker is not None and maker not in self._attention:
                    wanted[self._stage_of[maker]].add(name)
        for layer, node in enumerate(self._layers):
            early = {n for n in node.reads if self._stage_of.get(self._maker.get(n, -1)) != layer}
            for name in early:  # made by an earlier piece, a mask as a rule
                maker = self._maker.get(name)
                if maker is None:
                    raise NotCut("gives an input of the graph straight to attention")
                wanted[layer].discard(name)
                wanted[self._stage_of[maker]].add(name)
        return tuple(
            self._piece(member, reads, out)
            for member, reads, out in zip(members, crossing, wanted, strict=True)
        )

    def _is_constant(self, index: int) -> bool:
        return self._graph.nodes[index].kind == CONSTANT

    def _read_of(self, members: set[int]) -> set[str]:
        """The values that come into a piece."""
        made = {name for index in members for name in self._graph.nodes[index].outputs}
        reads = {name for index in members for name in self._graph.nodes[index].inputs if name}
        return {
            name
            for name in reads - made - set(self._graph.weights)
            if not (name in self._maker and self._is_constant(self._maker[name]))
        }

    def _piece(self, members: set[int], inputs: set[str], outputs: set[str]) -> Piece:
        nodes = self._with_constants(members)
        made = {name for index in nodes for name in self._graph.nodes[index].outputs}
        reads = {name for index in nodes for name in self._graph.nodes[index].inputs}
        return Piece(
            nodes=tuple(nodes),
            weights=tuple(sorted(reads & set(self._graph.weights))),
            inputs=tuple(sorted(inputs)),
            outputs=tuple(sorted(outputs & made)),
        )

    def _with_constants(self, members: set[int]) -> list[int]:
        """Each piece has the constants that it reads."""
        read = {n for index in members for n in self._graph.nodes[index].inputs if n}
        makers = {self._maker[name] for name in read if name in self._maker}
        return sorted(members | {index for index in makers if self._is_constant(index)})


def _repeated(graph: OnnxGraph, pieces: tuple[Piece, ...]) -> int:
    seen: set[str] = set()
    total = 0
    for piece in pieces:
        total += sum(graph.weights[name].num_bytes for name in piece.weights if name in seen)
        seen.update(piece.weights)
    return total
