"""OnnxOptions: what to allocate for an ONNX model, and where it runs. Allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.providers import CPU
from lowtide.models.onnx.thread_pool import set_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """`context` and `max_rows` count tokens; `stage` is entered around "weights" and "context".

    `kv_type` is what a graph that is cut keeps keys and values as; a whole one keeps its own.
    `provider` is the short name of an execution provider.
    """

    context: int
    max_rows: int
    threads: int
    kv_type: str = "f32"
    provider: str = CPU
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext


def session_options(threads: int) -> Any:
    """Return onnxruntime's options: nothing is kept between passes, and threads sleep between them."""
    options = onnx_library("onnxruntime").SessionOptions()
    set_threads(options, threads)
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    return options
