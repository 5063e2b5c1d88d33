"""What a plan must know of an ONNX graph that is cut at its attention: its spec, and what a pass takes."""

from __future__ import annotations

from dataclasses import replace

from lowtide.attention.dense import Dense
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal import Tidal
from lowtide.memory import footprint
from lowtide.models.errors import BadOption
from lowtide.models.onnx.kv_cache import ELEMENT_BYTES
from lowtide.models.onnx.spec import OnnxSpec

POLICIES = (Dense, Tidal)
INLINE_COPIES = 3
"""Weights inside the .onnx file are there as it was read, in a piece to be written, and in one written."""
BIAS_COPIES = 6
"""Rows by keys alive at once while a graph makes the bias that hides keys, and while it becomes a mask."""


def cut_spec(spec: OnnxSpec, policy: AttentionPolicy) -> OnnxSpec:
    """Return the spec of the graph in pieces under `policy`; raises `BadOption` where that cannot be."""
    if isinstance(spec.cut, str):
        raise BadOption(
            f"attention is {policy.name!r}, and {spec.name} is an ONNX graph, which runs whole with its "
            f"own {spec.attention}, as it {spec.cut}: leave attention out, or take the model as GGUF"
        )
    if not isinstance(policy, POLICIES):
        names = " and ".join(known.name for known in POLICIES)
        raise BadOption(
            f"attention is {policy.name!r}, and {spec.name} is an ONNX graph, for which there are {names}: "
            "take one of them, or the model as GGUF"
        )
    kv_types = spec.kv_types if "f16" in spec.kv_types else (*spec.kv_types, "f16")
    return replace(
        spec,
        cache_copies=1,
        kv_types=kv_types,
        copied_bytes=spec.copied_bytes
        + spec.cut.repeated_bytes
        + (INLINE_COPIES - 1) * spec.cut.inline_bytes,
    )


class CutSizes:
    """`ContextSizes` of a graph in pieces: upper bounds, held against measurements by tests."""

    def __init__(self, spec: OnnxSpec) -> None:
        assert not isinstance(spec.cut, str), "it is a `cut_spec`"
        self._spec = spec
        self._cut = spec.cut

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def compute_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return the activations of the largest piece, what is handed over, masks, and the logits."""
        spec, cells = self._spec, footprint.kv_cells(context)
        heads = spec.num_heads * spec.key_head_size
        inside = 6 * spec.widest_product + 8 * spec.embedding_width + 6 * heads
        # Both pieces' hidden rows, queries, keys and values, queries once more for the kernels, the result.
        handed_over = 4 * spec.embedding_width + 8 * heads
        masks = {(node.bias, node.is_causal, node.window) for node in self._cut.layers}
        biases = {node.bias for node in self._cut.layers if node.bias}
        seen = 2 * len(masks) + 4 * BIAS_COPIES * len(biases)
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        inputs = 3 * 8 * cells
        rows = 4 * (inside + handed_over) + seen * cells + logits
        return max_rows * rows + inputs + spec.unpacked_bytes
