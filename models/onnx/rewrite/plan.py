"""What a rewritten ONNX graph consists of, as plain values.

`RewritePlan` names the nodes that lowtide's attention and matmul kernels replace and what remains of the
graph. `RepackPlan` adds the matrices that are repacked into a file. `OnnxSpec` holds both; the readers
beside this file (`attention_nodes`, `matmul_nodes`, `rewrite`) make them.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

from lowtide.models.onnx.rewrite.block_weights import BlockWeights
from lowtide.models.spec import TILE_ALIGNMENT


class CannotRewrite(Exception):
    """The graph must run as it is; the message completes "its graph ..."."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNode:
    """One attention node of the graph; strings name values of the graph, "" where there is none.

    With neither `key` nor `value`, `query` is all three, packed. `bias` is added to the scores and hides
    keys. `cosines` and `sines` are weights, (positions, pairs), of the rotary embedding. A causal node
    attends to the last `window` keys, the token's own included, or to all. `past` and `present` name its KV
    cache, keys and values.
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
    head_dim: int
    scale: float
    softcap: float
    is_causal: bool
    window: int | None
    past: tuple[str, str]
    present: tuple[str, str]

    @property
    def has_packed_qkv(self) -> bool:
        """Whether queries, keys and values are one tensor, side by side."""
        return not self.key

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that the graph computes for this node."""
        return tuple(n for n in (self.query, self.key, self.value, self.bias) if n)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulNode:
    """A product of `activations` and matrix number `matrix`; replaces the node `index`, which makes `output`."""

    index: int
    activations: str
    bias: str
    output: str
    matrix: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that the graph computes for this node."""
        return (self.activations, self.bias) if self.bias else (self.activations,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherNode:
    """A lookup of the rows `ids` in matrix number `matrix`: the embedding."""

    index: int
    ids: str
    output: str
    matrix: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that the graph computes for this node."""
        return (self.ids,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulNodes:
    """The replaceable matmuls and lookups, in the graph's order, and their matrices."""

    matrices: tuple[BlockWeights, ...] = ()
    matmuls: tuple[MatmulNode, ...] = ()
    gathers: tuple[GatherNode, ...] = ()

    @property
    def nodes(self) -> tuple[MatmulNode | GatherNode, ...]:
        """All matmuls, then all lookups."""
        return (*self.matmuls, *self.gathers)

    def among(self, indices: Set[int]) -> MatmulNodes:
        """Return the nodes that have an index in `indices`; matrices keep their numbers."""
        return replace(
            self,
            matmuls=tuple(node for node in self.matmuls if node.index in indices),
            gathers=tuple(node for node in self.gathers if node.index in indices),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritePlan:
    """Which nodes lowtide's kernels replace, and which nodes and weights remain onnxruntime's.

    `nodes` are indices of the remaining nodes, `weights` those that these read, `inputs` the graph's inputs
    that are still read. `inline_bytes` counts the weights inside the .onnx file.
    """

    layers: tuple[AttentionNode, ...]
    nodes: frozenset[int]
    weights: frozenset[str]
    inputs: frozenset[str]
    inline_bytes: int
    matmuls: MatmulNodes = field(default_factory=MatmulNodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackPlan:
    """A rewrite in which lowtide's matmul kernels read repacked matrices, and what it leaves to onnxruntime.

    `remaining_bytes` is the size of the weights that onnxruntime reads; `copied_bytes`, `copying_bytes` and
    `dequantised_bytes` are those of `OnnxSpec` for them.
    """

    rewrite: RewritePlan
    remaining_bytes: int
    copied_bytes: int
    copying_bytes: int
    dequantised_bytes: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each matrix begins in the file of repacked weights, and the file's size.

        The first `TILE_ALIGNMENT` bytes are the file's header.
        """
        step, offsets = TILE_ALIGNMENT, [TILE_ALIGNMENT]
        for matrix in self.rewrite.matmuls.matrices:
            offsets.append(-(-(offsets[-1] + matrix.num_bytes) // step) * step)
        return tuple(offsets)
