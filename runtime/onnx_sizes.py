"""What onnxruntime allocates for a context: upper bounds, held against measurements by tests."""

from __future__ import annotations

from lowtide.memory import footprint
from lowtide.models.onnx.kv_cache import ELEMENT_BYTES
from lowtide.models.onnx.spec import OnnxSpec

ATTENTION_COPIES = 4
"""Rows by keys alive at once in decomposed attention, where operators make one each, at most in others."""
SHARING_COPIES = 1
"""The same in GroupQueryAttention, which reads keys and values where they are."""


class OnnxSizes:
    """`ContextSizes` of a graph that is run whole."""

    def __init__(self, spec: OnnxSpec) -> None:
        self._spec = spec

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes, with the longer copy that some graphs make of it."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def reader_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return nothing: a graph that is run whole has no second cache."""
        return 0

    def compute_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return the activations of a pass, attention's among them, what goes in, and the logits."""
        spec, cells = self._spec, footprint.kv_cells(context)
        heads = spec.num_heads * spec.key_head_size
        row = 4 * (6 * spec.widest_product + 8 * spec.embedding_width + 6 * heads)
        copies = SHARING_COPIES if spec.shares_cache else ATTENTION_COPIES
        scores = 4 * copies * spec.num_heads * cells
        # Keys and values of one layer, repeated for every head where attention is decomposed.
        layer = 0 if spec.shares_cache else 4 * 4 * cells * heads
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        num_logits = 1 if spec.makes_last_row else max_rows
        inputs = 3 * 8 * cells
        return (
            max_rows * (row + scores) + layer + num_logits * logits + inputs + spec.unpacked_bytes
        )
