"""The process baseline and the context sizes of an ONNX model.

The baseline is measured: libraries are imported and the tokenizer is loaded. The sizes are upper bounds of
what onnxruntime allocates for a pass; tests compare them with measurements.
"""

from __future__ import annotations

import contextlib
import gc
import platform
import sys
from functools import partial

from lowtide.attention.bindings.library import native_library
from lowtide.memory.budget import Budget
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.os.shared_libraries import address_of, fault_in
from lowtide.memory.plan import estimates
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.onnx.config import onnx_library
from lowtide.models.onnx.spec import ELEMENT_BYTES, OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer
from lowtide.models.template.families import LONGEST_TEMPLATE
from lowtide.runtime.backends.backend import PlannedPrompt, prompt_tokens_of

SESSION_BYTES = 13 * MIB
"""What onnxruntime takes for a session beside its weights: code pages, nodes, threads."""
VOCABULARY_BYTES_PER_BYTE = 24
"""Memory per byte of tokenizer.json, at most, where it is not measured."""
FILTER_CONTEXT_BYTES = MIB
"""Bindings and views of a second KV cache in the same session."""
INLINE_COPIES = 3
"""Weights inside the .onnx file exist three times: as read, in the rewritten graph, and serialised."""

ATTENTION_COPIES = 4
"""Arrays of (tokens, keys) alive at once in decomposed attention, one per operator; fused ones have fewer."""
SHARED_CACHE_COPIES = 1
"""The same in GroupQueryAttention, which reads keys and values where they are."""
BIAS_COPIES = 6
"""Arrays of (tokens, keys) alive at once while a graph computes the bias that hides keys."""


class OnnxSizes:
    """`ContextSizes` of an ONNX graph that runs as it is or rewritten: upper bounds."""

    def __init__(self, spec: OnnxSpec, *, is_rewritten: bool) -> None:
        self._spec = spec
        self._is_rewritten = is_rewritten

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the bytes of the KV cache, including the longer copy that some graphs make."""
        return estimates.kv_bytes(self._spec, context, kv_type)

    def slot_bytes(self, context: int, num_used: int) -> int:
        """Return 0: the KV cache is lowtide's own and has no list of slots."""
        return 0

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return what a second KV cache takes beside its buffers; a graph that runs as it is has none."""
        return FILTER_CONTEXT_BYTES if self._is_rewritten else 0

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the bytes of a pass: activations, attention, inputs and logits."""
        spec, slots = self._spec, estimates.padded_context(context)
        activations = 4 * (6 * spec.max_matmul_width + 8 * spec.embedding_width)
        token_bytes, layer_bytes = self._attention_bytes(slots)
        logits = ELEMENT_BYTES[spec.logits_element] * spec.vocabulary.num_tokens
        num_logits = 1 if spec.last_logits_only else batch_size
        inputs = 3 * 8 * slots
        return (
            batch_size * (activations + token_bytes)
            + layer_bytes
            + num_logits * logits
            + inputs
            + spec.dequantised_bytes
        )

    def _attention_bytes(self, slots: int) -> tuple[int, int]:
        """Return what attention takes per token of a batch, and once per pass."""
        spec = self._spec
        heads = spec.num_heads * spec.key_head_dim
        if not self._is_rewritten:
            copies = SHARED_CACHE_COPIES if spec.shares_cache else ATTENTION_COPIES
            # Keys and values of one layer, repeated for every query head where attention is decomposed.
            repeated = 0 if spec.shares_cache else 4 * 4 * slots * heads
            return 4 * 6 * heads + 4 * copies * spec.num_heads * slots, repeated
        assert not isinstance(spec.rewrite, str), "the spec is that of a rewritten graph"
        layers = spec.rewrite.layers
        masks = {(node.bias, node.is_causal, node.window) for node in layers}
        biases = {node.bias for node in layers if node.bias}
        # A mask may grow to twice its size. The queries are copied once for the kernels; in fp16 the result is.
        mask_bytes = 4 * len(masks) + 4 * BIAS_COPIES * len(biases)
        return 4 * 8 * heads + mask_bytes * slots, 0


def measured_baseline(spec: OnnxSpec, budget: Budget, *, is_rewritten: bool) -> ProcessBaseline:
    """Return the baseline to plan `spec` with.

    A budget that the vocabulary would exceed is planned with a formula. Raises `ModelError` where the `onnx`
    extra is missing or the tokenizer is another model's.
    """
    onnx_library("onnxruntime")
    onnx_library("tokenizers")
    if is_rewritten:
        onnx_library("onnx")
        fault_in(address_of(native_library().lowtide_native_version))
    with contextlib.suppress(TemplateError):
        ChatTemplate(spec.chat_template or LONGEST_TEMPLATE, {})
    before = read_process_memory().resident_bytes
    vocabulary, loading = _most_vocabulary_bytes(spec), 0
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
        and estimates.kv_token_bytes(spec, spec.kv_types[0]) is not None,
        vocabulary_bytes=vocabulary,
        vocabulary_loading_bytes=loading,
        tolerance_bytes=MIB,
    )


def count_prompt(spec: OnnxSpec, budget: Budget, prompt: PlannedPrompt | None) -> int:
    """Return the tokens of a prompt with its answer; an estimate where the budget has no room for the vocabulary."""
    needed = read_process_memory().resident_bytes + _most_vocabulary_bytes(spec) + SESSION_BYTES
    load = partial(OnnxTokenizer, spec) if needed <= budget.num_bytes else None
    num_tokens = prompt_tokens_of(prompt, spec, budget, load)
    gc.collect()
    trim_heap()
    return num_tokens


def _most_vocabulary_bytes(spec: OnnxSpec) -> int:
    return VOCABULARY_BYTES_PER_BYTE * spec.tokenizer_path.stat().st_size
