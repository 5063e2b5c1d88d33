"""What to allocate for a GGUF model, and llama.cpp's parameters for it, for loading and for dry runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lowtide.models.gguf.gpu import cpu_buffer_type, device_address
from lowtide.models.gguf.header.reader import TYPE_NUMBERS
from lowtide.models.gguf.header.spec import ATTENTION_OUTPUT

LOAD_COPY = 0
LOAD_MEMORY_MAP = 1
FLASH_ATTENTION_OFF = 0
FLASH_ATTENTION_ON = 1
NOTHING = "^$"
"""A pattern that matches no tensor's name."""


@dataclass(frozen=True, slots=True)
class DeviceLayers:
    """How many layers a device gets; `device` is ggml's name for it."""

    device: str
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to allocate.

    `context` and `batch_size` count tokens. `repack` lets llama.cpp copy weights into a layout of its own.
    `eval_callback` is llama.cpp's evaluation callback (the address of a C function, and its user data), which
    lowtide's kernels are called through. `stage` is entered around "weights" and "context" as they are made.
    `gpu_layers` go to devices, the output matrix as the last layer; with `gpu_attention` their KV cache and
    attention do too. `verify_batch` is how many tokens of a pass may have logits, `sequences` how many
    sequences share the slots of the KV cache. With `pooling`, llama.cpp's number of a way to pool, the context
    embeds: then `verify_batch` is how many tokens of a pass have vectors. In the `background`, passes compute where
    nobody else wants the cores.
    """

    context: int
    batch_size: int
    threads: int
    kv_type: str = "f16"
    memory_map: bool = True
    repack: bool = True
    eval_callback: tuple[int, int] | None = None
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext
    gpu_layers: tuple[DeviceLayers, ...] = ()
    gpu_attention: bool = True
    verify_batch: int = 1
    sequences: int = 1
    pooling: int | None = None
    background: bool = False


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override: the buffer type of tensors whose names match a pattern."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def model_parameters(
    api: Any,
    *,
    memory_map: bool,
    repack: bool,
    gpu_layers: tuple[DeviceLayers, ...] = (),
    gpu_attention: bool = True,
) -> Any:
    """Return llama.cpp's parameters for the weights; the object keeps alive what they point to."""
    params = api.llama_model_default_params()
    # An explicit list even if it is empty: without one llama.cpp starts every device, used or not.
    devices = (ctypes.c_void_p * (len(gpu_layers) + 1))(
        *(device_address(layers.device) for layers in gpu_layers), None
    )
    params.devices = ctypes.addressof(devices)
    params.n_gpu_layers = sum(layers.num_layers for layers in gpu_layers)
    params.references = [devices]
    if gpu_layers:
        shares = (ctypes.c_float * api.llama_max_devices())(*(g.num_layers for g in gpu_layers))
        params.tensor_split = shares
        params.references.append(shares)
        # With flash attention `offload_kqv` moves only the KV cache; attention is computed where the matrix
        # that follows it lies. Any override also keeps llama.cpp from buffering inputs of several passes.
        on_cpu = NOTHING if gpu_attention else ATTENTION_OUTPUT.replace(".", r"\.")
        overrides = (_Override * 2)(_Override(on_cpu.encode(), cpu_buffer_type()))
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        params.references.append(overrides)
    params.load_mode = LOAD_MEMORY_MAP if memory_map else LOAD_COPY
    params.use_extra_bufts = repack
    return params


def context_parameters(api: Any, options: LoadOptions) -> Any:
    """Return llama.cpp's parameters for a context with room for few tokens' logits."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = params.n_ubatch = options.batch_size
    params.n_seq_max = options.sequences
    params.kv_unified = options.sequences > 1  # a shared prefix is stored once
    params.n_outputs_max = options.verify_batch
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = FLASH_ATTENTION_ON
    params.type_k = params.type_v = TYPE_NUMBERS[options.kv_type.upper()]
    params.swa_full = True  # truncating a sliding window is exact only with its whole past
    params.no_perf = True
    params.offload_kqv = options.gpu_attention
    params.op_offload = False  # it would copy weights to a device for every prompt, unplanned
    if options.pooling is not None:
        params.embeddings, params.pooling_type = True, options.pooling
        # In fp32: flash attention rounds sums to fp16, so that texts beside a text would show in its vector.
        params.flash_attn_type = FLASH_ATTENTION_OFF
    if options.eval_callback is not None:
        address, user_data = options.eval_callback
        params.cb_eval = api.ggml_backend_sched_eval_callback(address)
        params.cb_eval_user_data = user_data
    return params
