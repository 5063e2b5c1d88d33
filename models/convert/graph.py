"""DecoderGraph: the ONNX graph of a llama, Gemma 3 or Qwen decoder; its weights are written along the way.

Attention is GroupQueryAttention with rotary embedding inside. Logits are those of the last token alone, which
onnxruntime-genai calls trimmed: a prompt then needs no room for the logits of its other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.models.convert.dequantize import GgufWeights, unpaired
from lowtide.models.convert.onnx_writer import MICROSOFT, GraphNodes, MatrixWriter
from lowtide.models.convert.shape import DecoderShape, Rotary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


EMBEDDING, OUTPUT, FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
BATCH, TOKENS, PAST, TOTAL = "batch", "tokens", "past_tokens", "total_tokens"
INT32 = 6
"""onnx's number of the element type."""
TABLE_SLICE = 4096
"""How many positions of a rotary table are computed in float64 at a time."""
SIMPLE_NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


@dataclass(frozen=True, slots=True)
class _Positions:
    """Inputs of every layer's attention: the last position, the total length, and the rotary tables."""

    last: str
    total: str
    tables: tuple[str, str]
    local_tables: tuple[str, str]


class DecoderGraph:
    """The graph of one decoder; `build` adds its nodes and writes its weights."""

    def __init__(
        self, shape: DecoderShape, weights: GgufWeights, nodes: GraphNodes, matrices: MatrixWriter
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._nodes = nodes
        self._matrices = matrices

    def build(self) -> None:
        """Add all nodes from token ids to logits."""
        nodes, shape = self._nodes, self._shape
        token_ids = nodes.input("input_ids", "int64", (BATCH, TOKENS))
        positions = self._positions(nodes.input("attention_mask", "int64", (BATCH, TOTAL)))
        embedding = self._matrices.store(EMBEDDING)
        hidden = self._matrices.lookup(token_ids, embedding)
        if shape.architecture.is_gemma:
            hidden = nodes.add("Mul", hidden, nodes.scalar(float(shape.width**0.5)))
        residual = ""
        for layer in range(shape.num_layers):
            hidden, residual = self._layer(layer, hidden, residual, positions)
        hidden = self._last_token(nodes.add("Add", hidden, residual))
        normed = self._norm(hidden, "output_norm.weight")
        head = self._matrices.store(OUTPUT) if OUTPUT in self._weights else embedding
        logits = nodes.output("logits", (BATCH, 1, shape.vocabulary))
        self._matrices.matmul(normed, head, output=logits)

    def _positions(self, mask: str) -> _Positions:
        nodes, shape = self._nodes, self._shape
        count = nodes.add("ReduceSum", mask, nodes.constant(1), keepdims=0)
        last = nodes.add("Cast", nodes.add("Sub", count, nodes.scalar(1)), to=INT32)
        width = nodes.add("Gather", nodes.add("Shape", mask), nodes.scalar(1))
        total = nodes.add("Cast", width, to=INT32)
        tables = self._tables("rotary", shape.rotary)
        local = shape.local_rotary
        return _Positions(
            last, total, tables, self._tables("local_rotary", local) if local else tables
        )

    def _tables(self, name: str, rotary: Rotary) -> tuple[str, str]:
        shape = self._shape
        factors = self._weights.vector(FACTORS) if FACTORS in self._weights else None
        tables = rotary_tables(rotary, shape.head_size, shape.context_length, factors)
        cosines, sines = (
            self._matrices.table(f"{name}.{part}", table)
            for part, table in zip(("cos", "sin"), tables, strict=True)
        )
        return cosines, sines

    def _last_token(self, hidden: str) -> str:
        nodes = self._nodes
        ends = nodes.constant(2**31 - 1)
        return nodes.add("Slice", hidden, nodes.constant(-1), ends, nodes.constant(1))

    def _layer(
        self, layer: int, hidden: str, residual: str, positions: _Positions
    ) -> tuple[str, str]:
        """Add a layer. The hidden state is `hidden` plus `residual`, at its begin and at its end."""
        hidden, normed = self._normed_sum(hidden, residual, f"blk.{layer}.attn_norm.weight")
        attended = self._attention(layer, normed, positions)
        attended = self._gemma_norm(attended, f"blk.{layer}.post_attention_norm.weight")
        hidden, normed = self._normed_sum(hidden, attended, f"blk.{layer}.ffn_norm.weight")
        output = self._feed_forward(layer, normed)
        return hidden, self._gemma_norm(output, f"blk.{layer}.post_ffw_norm.weight")

    def _normed_sum(self, hidden: str, residual: str, name: str) -> tuple[str, str]:
        """Return the sum and its norm, which one operator computes."""
        if not residual:
            return hidden, self._norm(hidden, name)
        epsilon = self._shape.norm_epsilon
        normed, _, _, summed = self._nodes.add_many(
            SKIP_NORM,
            (residual, hidden, self._vector(name)),
            ("", None, None, ""),
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return summed, normed

    def _norm(self, hidden: str, name: str) -> str:
        epsilon = self._shape.norm_epsilon
        return self._nodes.add(
            SIMPLE_NORM, hidden, self._vector(name), axis=-1, epsilon=epsilon, stash_type=1
        )

    def _gemma_norm(self, x: str, name: str) -> str:
        return self._norm(x, name) if self._shape.architecture.is_gemma else x

    def _vector(self, name: str) -> str:
        return self._nodes.vector(name, self._weights.vector(name))

    def _projected(self, layer: int, x: str, part: str, heads: int = 0) -> str:
        name = f"blk.{layer}.{part}"
        matrix = self._matrices.store(f"{name}.weight", heads)
        return self._matrices.matmul(x, matrix, self._bias(f"{name}.bias", heads))

    def _bias(self, name: str, heads: int) -> str:
        if name not in self._weights:
            return ""
        numbers = self._weights.vector(name)
        return self._nodes.vector(
            name, numbers[unpaired(len(numbers), heads)] if heads else numbers
        )

    def _attention(self, layer: int, x: str, positions: _Positions) -> str:
        shape, nodes = self._shape, self._nodes
        pairs = shape.architecture.has_paired_rows
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        queries = self._projected(layer, x, "attn_q", heads if pairs else 0)
        keys = self._projected(layer, x, "attn_k", kv_heads if pairs else 0)
        values = self._projected(layer, x, "attn_v")
        queries = self._head_norm(queries, f"blk.{layer}.attn_q_norm.weight", heads)
        keys = self._head_norm(keys, f"blk.{layer}.attn_k_norm.weight", kv_heads)
        is_local = shape.is_local(layer)
        past_shape = (BATCH, kv_heads, PAST, shape.head_size)
        past = [
            nodes.input(f"past_key_values.{layer}.{part}", "float32", past_shape)
            for part in ("key", "value")
        ]
        present_shape = (BATCH, kv_heads, TOTAL, shape.head_size)
        present = [
            nodes.output(f"present.{layer}.{part}", present_shape) for part in ("key", "value")
        ]
        tables = positions.local_tables if is_local else positions.tables
        attended, *_ = nodes.add_many(
            "GroupQueryAttention",
            (queries, keys, values, *past, positions.last, positions.total, *tables),
            ("", *present),
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=shape.score_scale,
            local_window_size=shape.window if is_local else -1,
        )
        return self._projected(layer, attended, "attn_output")

    def _head_norm(self, x: str, name: str, heads: int) -> str:
        if name not in self._weights:
            return x
        nodes, size = self._nodes, self._shape.head_size
        split = nodes.add("Reshape", x, nodes.constant(0, 0, heads, size))
        return nodes.add("Reshape", self._norm(split, name), nodes.constant(0, 0, heads * size))

    def _feed_forward(self, layer: int, x: str) -> str:
        nodes = self._nodes
        gate, up = (self._projected(layer, x, part) for part in ("ffn_gate", "ffn_up"))
        if self._shape.architecture.is_gemma:
            gate = nodes.add("FastGelu", gate, domain=MICROSOFT)
        else:
            gate = nodes.add("Mul", gate, nodes.add("Sigmoid", gate))
        return self._projected(layer, nodes.add("Mul", gate, up), "ffn_down")


def rotary_tables(
    rotary: Rotary, head_size: int, num_positions: int, factors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the tables of cosines and sines, float32 of (positions, head_dim / 2).

    Su et al., "RoFormer", section 3.4. `factors`, (head_dim / 2,), divide the angles one by one: Llama 3's
    scaling, as llama.cpp stores it.
    """
    import numpy as np

    steps = rotary.base ** (-2.0 * np.arange(head_size // 2, dtype=np.float64) / head_size)
    if factors is not None:
        steps /= factors
    cosines, sines = (np.empty((num_positions, head_size // 2), np.float32) for _ in range(2))
    for start in range(0, num_positions, TABLE_SLICE):
        positions = np.arange(start, min(start + TABLE_SLICE, num_positions), dtype=np.float64)
        angles = positions[:, None] * (steps / rotary.divisor)
        cosines[start : start + TABLE_SLICE] = np.cos(angles)
        sines[start : start + TABLE_SLICE] = np.sin(angles)
    return cosines, sines
