"""What the plan of an ONNX model should know of this process: libraries imported, the vocabulary loaded.

What is resident then is what an open model needs beside weights, cache and buffers.
"""

from __future__ import annotations

import contextlib
import gc
import platform
import sys

from lowtide.attention.native_library import native_library
from lowtide.memory import footprint
from lowtide.memory.budget import Budget
from lowtide.memory.heap import trim_heap
from lowtide.memory.loaded_code import address_of, read_in
from lowtide.memory.meter import read_process_memory
from lowtide.memory.plan import Host
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer

SESSION_BYTES = 10 * MIB
"""What onnxruntime takes for a session beside its weights: its code that is read in, nodes, threads."""
VOCABULARY_BYTES_PER_BYTE = 24
"""Memory for each byte of tokenizer.json at most, where it is not measured."""


def measured_onnx_host(spec: OnnxSpec, budget: Budget, *, is_swapped: bool = False) -> Host:
    """Return the host to plan `spec` with.

    Raises `ModelError` where the extra is missing or the vocabulary is another model's. A budget that
    could not hold the vocabulary is planned by formulas.
    """
    onnx_library("onnxruntime")
    onnx_library("tokenizers")
    if is_swapped:
        onnx_library("onnx")
        read_in(address_of(native_library().lowtide_native_version))
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
    return Host(
        interpreter_bytes=before + SESSION_BYTES,
        processor=platform.machine(),
        kv_follows_use=sys.platform == "linux"
        and footprint.kv_row_bytes(spec, spec.kv_types[0]) is not None,
        vocabulary_bytes=vocabulary,
        vocabulary_loading_bytes=loading,
        tolerance_bytes=MIB,
    )
