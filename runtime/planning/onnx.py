"""What onnxruntime allocates for a context: upper bounds, held against measurements by tests.

What the plan of an ONNX model should know of this process: libraries imported, the vocabulary loaded.

What is resident then is what an open model needs beside weights, cache and buffers.

What a plan must know of an ONNX graph whose attention is ours: its spec, and what a pass takes."""

from __future__ import annotations

import contextlib
import gc
import platform
import sys
from dataclasses import replace

from lowtide.attention.bindings.library import native_library
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.os.shared_libraries import address_of, fault_in
from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import BadOption, TemplateError
from lowtide.models.onnx.config import onnx_library
from lowtide.models.onnx.kv_cache import ELEMENT_BYTES
from lowtide.models.onnx.read_spec import packed_spec
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer

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

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return nothing: a graph that is run whole has no second cache."""
        return 0

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the activations of a pass, attention's among them, what goes in, and the logits."""
        spec, cells = self._spec, footprint.padded_context(context)
        heads = spec.num_heads * spec.key_head_dim
        row = 4 * (6 * spec.max_matmul_width + 8 * spec.embedding_width + 6 * heads)
        copies = SHARING_COPIES if spec.shares_cache else ATTENTION_COPIES
        scores = 4 * copies * spec.num_heads * cells
        # Keys and values of one layer, repeated for every head where attention is decomposed.
        layer = 0 if spec.shares_cache else 4 * 4 * cells * heads
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        num_logits = 1 if spec.makes_last_row else batch_size
        inputs = 3 * 8 * cells
        return (
            batch_size * (row + scores) + layer + num_logits * logits + inputs + spec.original_bytes
        )


SESSION_BYTES = 10 * MIB
"""What onnxruntime takes for a session beside its weights: its code that is read in, nodes, threads."""
VOCABULARY_BYTES_PER_BYTE = 24
"""Memory for each byte of tokenizer.json at most, where it is not measured."""


def measured_onnx_baseline(
    spec: OnnxSpec, budget: Budget, *, is_rewritten: bool = False
) -> ProcessBaseline:
    """Return the host to plan `spec` with.

    Raises `ModelError` where the extra is missing or the vocabulary is another model's. A budget that
    could not hold the vocabulary is planned by formulas.
    """
    onnx_library("onnxruntime")
    onnx_library("tokenizers")
    if is_rewritten:
        onnx_library("onnx")
        fault_in(address_of(native_library().lowtide_native_version))
    with contextlib.suppress(TemplateError):
        ChatTemplate(spec.chat_template, {})
    before = read_process_memory().resident_bytes
    vocabulary, loading = VOCABULARY_BYTES_PER_BYTE * spec.tokenizer_path.stat().st_size, 0
    if before + vocabulary + SESSION_BYTES <= budget.num_bytes:
        tokenizer = OnnxTokenizer(spec)
        peak = read_process_memory().peak_bytes
        gc.collect()
        trim_heap()
        vocabulary = max(read_process_memory().resident_bytes - before, 0)
        loading = max(peak - before - vocabulary, 0)
        del tokenizer
        gc.collect()
        trim_heap()
    return ProcessBaseline(
        interpreter_bytes=before + SESSION_BYTES,
        processor=platform.machine(),
        kv_on_demand=sys.platform == "linux"
        and footprint.kv_token_bytes(spec, spec.kv_types[0]) is not None,
        vocabulary_bytes=vocabulary,
        vocabulary_loading_bytes=loading,
        tolerance_bytes=MIB,
    )


READER_BYTES = MIB
KV_TYPES = ("f16", "f32")
"""What keys and values may be kept as, whatever the graph computes in; halves unless said otherwise."""
INLINE_COPIES = 3
"""Weights inside the .onnx file are there as it was read, in the graph that is written, and written."""
BIAS_COPIES = 6
"""Rows by keys alive at once while a graph makes the bias that hides keys."""


def rewritten_spec(spec: OnnxSpec, policy: AttentionPolicy, *, packed: bool) -> OnnxSpec:
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


class RewrittenSizes:
    """`ContextSizes` of a graph with our attention: upper bounds, held against measurements by tests."""

    def __init__(self, spec: OnnxSpec) -> None:
        assert not isinstance(spec.swap, str), "it is a `rewritten_spec`"
        self._spec = spec
        self._swap = spec.swap

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return what another cache in the same session takes beside it: bindings and views."""
        return READER_BYTES

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the activations of a pass, masks, what goes in, and the logits."""
        spec, cells = self._spec, footprint.padded_context(context)
        heads = spec.num_heads * spec.key_head_dim
        # Queries once more for the kernels, and of halves the result.
        row = 4 * (6 * spec.max_matmul_width + 8 * spec.embedding_width + 8 * heads)
        masks = {(node.bias, node.is_causal, node.window) for node in self._swap.layers}
        biases = {node.bias for node in self._swap.layers if node.bias}
        # A mask grows to twice its size.
        seen = 4 * len(masks) + 4 * BIAS_COPIES * len(biases)
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        num_logits = 1 if spec.makes_last_row else batch_size
        inputs = 3 * 8 * cells
        return (
            batch_size * (row + seen * cells) + num_logits * logits + inputs + spec.original_bytes
        )
