"""What to ask of llama.cpp when a GGUF model is loaded, or only laid out. Allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Names of KV cache types and ggml's numbers for them."""

LOAD_COPY = 0
LOAD_MEMORY_MAP = 1
FLASH_ATTENTION_ON = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to allocate. `context` and `max_rows` count tokens; `repack` lets llama.cpp copy weights into
    a layout of its own; `eval_callback` is llama.cpp's evaluation callback (a C function pointer's address
    and its user data), for attention of our own; `stage` is entered around "weights" and "context" as they
    are made.
    """

    context: int
    max_rows: int
    threads: int
    kv_type: str = "f16"
    memory_map: bool = True
    repack: bool = True
    eval_callback: tuple[int, int] | None = None
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext


def model_parameters(api: Any, *, memory_map: bool, repack: bool) -> Any:
    """Return llama.cpp's parameters for the weights."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = LOAD_MEMORY_MAP if memory_map else LOAD_COPY
    params.use_extra_bufts = repack
    return params


def context_parameters(api: Any, options: LoadOptions) -> Any:
    """Return llama.cpp's parameters for a context of one sequence that computes one row of logits."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = params.n_ubatch = options.max_rows
    params.n_seq_max = 1
    params.n_outputs_max = 1
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = FLASH_ATTENTION_ON
    params.type_k = params.type_v = KV_TYPES[options.kv_type]
    params.swa_full = True  # rewinding a sliding window is exact only where its past is kept
    params.no_perf = True
    if options.eval_callback is not None:
        address, user_data = options.eval_callback
        params.cb_eval = api.ggml_backend_sched_eval_callback(address)
        params.cb_eval_user_data = user_data
    return params
