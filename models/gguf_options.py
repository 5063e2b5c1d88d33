"""What to ask of llama.cpp when a GGUF model is loaded, or only laid out. Allocates nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lowtide.models.gpu_device import cpu_buffer_type, device_address
from lowtide.models.weight_groups import ATTENTION_OUTPUT

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Names of KV cache types and ggml's numbers for them."""

LOAD_COPY = 0
LOAD_MEMORY_MAP = 1
FLASH_ATTENTION_ON = 1
NOTHING = "^$"
"""A pattern that no tensor's name has."""


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """How many layers a device gets, by the name that ggml has for it."""

    device: str
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to allocate. `context` and `max_rows` count tokens; `repack` lets llama.cpp copy weights into
    a layout of its own; `eval_callback` is llama.cpp's evaluation callback (a C function pointer's address
    and its user data), for attention of our own; `stage` is entered around "weights" and "context" as they
    are made. `gpu_layers` go to devices, the output's matrix as the last of them; with `gpu_attention`
    their KV cache and attention go there too. `verified_rows` is how many rows of a pass may have logits,
    `sequences` how many sequences share the cache's cells.
    """

    context: int
    max_rows: int
    threads: int
    kv_type: str = "f16"
    memory_map: bool = True
    repack: bool = True
    eval_callback: tuple[int, int] | None = None
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext
    gpu_layers: tuple[DeviceLayers, ...] = ()
    gpu_attention: bool = True
    verified_rows: int = 1
    sequences: int = 1


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override: where tensors go whose names a pattern is found in."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def model_parameters(
    api: Any,
    *,
    memory_map: bool,
    repack: bool,
    gpu_layers: tuple[DeviceLayers, ...] = (),
    gpu_attention: bool = True,
) -> Any:
    """Return llama.cpp's parameters for the weights; they point into memory that lives as long as they."""
    params = api.llama_model_default_params()
    # A list of its own, be it empty: llama.cpp would start every device, used or not.
    devices = (ctypes.c_void_p * (len(gpu_layers) + 1))(
        *(device_address(layers.device) for layers in gpu_layers), None
    )
    params.devices = ctypes.addressof(devices)
    params.n_gpu_layers = sum(layers.num_layers for layers in gpu_layers)
    params.kept_alive = [devices]
    if gpu_layers:
        shares = (ctypes.c_float * api.llama_max_devices())(*(g.num_layers for g in gpu_layers))
        params.tensor_split = shares
        params.kept_alive.append(shares)
        # With flash attention `offload_kqv` moves the cache alone; attention is computed where the matrix
        # that follows it lies. Any override keeps llama.cpp from holding inputs of several passes at once.
        stays = NOTHING if gpu_attention else ATTENTION_OUTPUT.replace(".", r"\.")
        overrides = (_Override * 2)(_Override(stays.encode(), cpu_buffer_type()))
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        params.kept_alive.append(overrides)
    params.load_mode = LOAD_MEMORY_MAP if memory_map else LOAD_COPY
    params.use_extra_bufts = repack
    return params


def context_parameters(api: Any, options: LoadOptions) -> Any:
    """Return llama.cpp's parameters for a context that computes few rows of logits."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = params.n_ubatch = options.max_rows
    params.n_seq_max = options.sequences
    params.kv_unified = options.sequences > 1  # what sequences share lies there once
    params.n_outputs_max = options.verified_rows
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = FLASH_ATTENTION_ON
    params.type_k = params.type_v = KV_TYPES[options.kv_type]
    params.swa_full = True  # rewinding a sliding window is exact only where its past is kept
    params.no_perf = True
    params.offload_kqv = options.gpu_attention
    params.op_offload = (
        False  # it would copy weights to a device for every prompt, in bytes unplanned
    )
    if options.eval_callback is not None:
        address, user_data = options.eval_callback
        params.cb_eval = api.ggml_backend_sched_eval_callback(address)
        params.cb_eval_user_data = user_data
    return params
