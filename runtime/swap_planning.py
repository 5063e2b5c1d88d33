"""What a plan must know of an ONNX graph whose attention is ours: its spec, and what a pass takes."""

from __future__ import annotations

from dataclasses import replace

from lowtide.attention.policy import AttentionPolicy
from lowtide.memory import footprint
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption
from lowtide.models.onnx.kv_cache import ELEMENT_BYTES
from lowtide.models.onnx.packed_form import packed_spec
from lowtide.models.onnx.spec import OnnxSpec

READER_BYTES = MIB
KV_TYPES = ("f16", "f32")
"""What keys and values may be kept as, whatever the graph computes in; halves unless said otherwise."""
INLINE_COPIES = 3
"""Weights inside the .onnx file are there as it was read, in the graph that is written, and written."""
BIAS_COPIES = 6
"""Rows by keys alive at once while a graph makes the bias that hides keys."""


def swapped_spec(spec: OnnxSpec, policy: AttentionPolicy, *, packed: bool) -> OnnxSpec:
    """Return the spec of the graph under `policy`, its products ours too where they are `packed`.

    Raises `BadOption` where that cannot be.
    """
    if packed:
        if isinstance(spec.packed, str):
            raise BadOption(
                f"pack is wanted, and {spec.name} is an ONNX graph that {spec.packed}: leave it out, "
                "or take the model as GGUF"
            )
        spec = packed_spec(spec, spec.packed)
    if isinstance(spec.swap, str):
        raise BadOption(
            f"attention is {policy.name!r}, and {spec.name} is an ONNX graph, which keeps its "
            f"own {spec.attention}, as it {spec.swap}: leave attention out, or take the model as GGUF"
        )
    return replace(
        spec,
        cache_copies=1,
        kv_types=KV_TYPES,
        copied_bytes=spec.copied_bytes + (INLINE_COPIES - 1) * spec.swap.inline_bytes,
    )


class SwappedSizes:
    """`ContextSizes` of a graph with our attention: upper bounds, held against measurements by tests."""

    def __init__(self, spec: OnnxSpec) -> None:
        assert not isinstance(spec.swap, str), "it is a `swapped_spec`"
        self._spec = spec
        self._swap = spec.swap

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def reader_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return what another cache in the same session takes beside it: bindings and views."""
        return READER_BYTES

    def compute_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return the activations of a pass, masks, what goes in, and the logits."""
        spec, cells = self._spec, footprint.kv_cells(context)
        heads = spec.num_heads * spec.key_head_size
        # Queries once more for the kernels, and of halves the result.
        row = 4 * (6 * spec.widest_product + 8 * spec.embedding_width + 8 * heads)
        masks = {(node.bias, node.is_causal, node.window) for node in self._swap.layers}
        biases = {node.bias for node in self._swap.layers if node.bias}
        # A mask grows to twice its size.
        seen = 4 * len(masks) + 4 * BIAS_COPIES * len(biases)
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        num_logits = 1 if spec.makes_last_row else max_rows
        inputs = 3 * 8 * cells
        return max_rows * (row + seen * cells) + num_logits * logits + inputs + spec.unpacked_bytes
