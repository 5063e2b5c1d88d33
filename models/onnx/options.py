"""OnnxOptions: what to allocate for an ONNX model, and where it runs. Allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.providers import CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """`context` and `max_rows` count tokens; `stage` is entered around "weights" and "context".

    `kv_type` is what keys and values are kept as where attention is ours; a whole one keeps its own.
    `provider` is the short name of an execution provider, `verified_rows` how many rows of a pass may have
    logits.
    """

    context: int
    max_rows: int
    threads: int
    kv_type: str = "f32"
    provider: str = CPU
    verified_rows: int = 1
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext


def session_options(threads: int) -> Any:
    """Return onnxruntime's options: threads sleep between passes.

    Activations lie in its arena, which keeps their room: in the C library's heap they now and then leave
    holes of tens of MiB.
    """
    options = onnx_library("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    return options
