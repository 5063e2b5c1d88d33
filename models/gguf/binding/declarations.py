"""llama.cpp's C API as far as lowtide calls it: the structs and functions of llama-cpp-python 0.3.36.

They are declared here so that any build of the same llama.cpp can be used: llama-cpp-python's own module
imports only where a library has every function of its version. Tests compare each declaration with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

VERSION = "0.3.36"
"""The version of llama-cpp-python whose llama.cpp is declared here."""
NUM_TENSOR_TYPES = 43
"""GGML_TYPE_COUNT of that version: ggml has no function that returns it."""

_bool, _int, _float = ctypes.c_bool, ctypes.c_int32, ctypes.c_float
_text, _size, _void = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
_floats, _bytes = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_uint8)
llama_token = ctypes.c_int32
_tokens = ctypes.POINTER(llama_token)
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
ggml_backend_sched_eval_callback = ctypes.CFUNCTYPE(_bool, _void, _bool, _void)


class llama_model_params(ctypes.Structure):
    """How to load weights."""

    _fields_ = [
        ("devices", _void),
        ("tensor_buft_overrides", _void),
        ("n_gpu_layers", _int),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", _int),
        ("tensor_split", _floats),
        ("progress_callback", _void),
        ("progress_callback_user_data", _void),
        ("kv_overrides", _void),
        ("vocab_only", _bool),
        ("check_tensors", _bool),
        ("use_extra_bufts", _bool),
        ("no_host", _bool),
        ("no_alloc", _bool),
        ("load_mtp", _bool),
    ]


class llama_context_params(ctypes.Structure):
    """How large a context is, and how it computes."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", _int),
        ("n_threads_batch", _int),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_freq_base", _float),
        ("rope_freq_scale", _float),
        ("yarn_ext_factor", _float),
        ("yarn_attn_factor", _float),
        ("yarn_beta_fast", _float),
        ("yarn_beta_slow", _float),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", _float),
        ("cb_eval", ggml_backend_sched_eval_callback),
        ("cb_eval_user_data", _void),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("abort_callback", _void),
        ("abort_callback_data", _void),
        ("embeddings", _bool),
        ("offload_kqv", _bool),
        ("no_perf", _bool),
        ("op_offload", _bool),
        ("swa_full", _bool),
        ("kv_unified", _bool),
        ("samplers", _void),
        ("n_samplers", _size),
        ("ctx_other", _void),
    ]


class llama_batch(ctypes.Structure):
    """Tokens of a pass, with their positions and sequences."""

    _fields_ = [
        ("n_tokens", _int),
        ("token", _tokens),
        ("embd", _floats),
        ("pos", ctypes.POINTER(_int)),
        ("n_seq_id", ctypes.POINTER(_int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


DEFAULTS: dict[type[ctypes.Structure], dict[str, Any]] = {
    llama_model_params: {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": 1,
        "use_extra_bufts": 1,
    },
    llama_context_params: {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_outputs_max_per_seq": 1,
        "n_threads": 4,
        "n_threads_batch": 4,
        "rope_scaling_type": -1,
        "pooling_type": -1,
        "attention_type": -1,
        "flash_attn_type": -1,
        "yarn_ext_factor": -1.0,
        "yarn_attn_factor": -1.0,
        "yarn_beta_fast": -1.0,
        "yarn_beta_slow": -1.0,
        "defrag_thold": -1.0,
        "type_k": 1,
        "type_v": 1,
        "offload_kqv": 1,
        "no_perf": 1,
        "op_offload": 1,
        "swa_full": 1,
    },
}
"""The default values that llama.cpp gives the fields of its parameter structs; the other fields are zero."""

FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_batch_free": (None, (llama_batch,)),
    "llama_batch_init": (llama_batch, (_int, _int, _int)),
    "llama_context_default_params": (llama_context_params, ()),
    "llama_decode": (_int, (_void, llama_batch)),
    "llama_encode": (_int, (_void, llama_batch)),
    "llama_free": (None, (_void,)),
    "llama_get_embeddings": (_floats, (_void,)),
    "llama_get_embeddings_seq": (_floats, (_void, _int)),
    "llama_get_logits": (_floats, (_void,)),
    "llama_get_logits_ith": (_floats, (_void, _int)),
    "llama_get_memory": (_void, (_void,)),
    "llama_get_model": (_void, (_void,)),
    "llama_init_from_model": (_void, (_void, llama_context_params)),
    "llama_log_set": (None, (llama_log_callback, _void)),
    "llama_max_devices": (_size, ()),
    "llama_memory_clear": (None, (_void, _bool)),
    "llama_memory_seq_cp": (None, (_void, _int, _int, _int, _int)),
    "llama_memory_seq_pos_max": (_int, (_void, _int)),
    "llama_memory_seq_pos_min": (_int, (_void, _int)),
    "llama_memory_seq_rm": (_bool, (_void, _int, _int, _int)),
    "llama_model_default_params": (llama_model_params, ()),
    "llama_model_free": (None, (_void,)),
    "llama_model_get_vocab": (_void, (_void,)),
    "llama_model_has_decoder": (_bool, (_void,)),
    "llama_model_has_encoder": (_bool, (_void,)),
    "llama_model_is_hybrid": (_bool, (_void,)),
    "llama_model_is_recurrent": (_bool, (_void,)),
    "llama_model_load_from_file": (_void, (_text, llama_model_params)),
    "llama_model_n_embd_out": (_int, (_void,)),
    "llama_n_ctx": (ctypes.c_uint32, (_void,)),
    "llama_print_system_info": (_text, ()),
    "llama_set_n_threads": (None, (_void, _int, _int)),
    "llama_state_seq_get_data": (_size, (_void, _bytes, _size, _int)),
    "llama_state_seq_get_size": (_size, (_void, _int)),
    "llama_state_seq_load_file": (
        _size,
        (_void, _text, _int, _tokens, _size, ctypes.POINTER(_size)),
    ),
    "llama_state_seq_save_file": (_size, (_void, _text, _int, _tokens, _size)),
    "llama_state_seq_set_data": (_size, (_void, _bytes, _size, _int)),
    "llama_token_to_piece": (_int, (_void, _int, _text, _int, _int, _bool)),
    "llama_tokenize": (_int, (_void, _text, _int, _tokens, _int, _bool, _bool)),
    "llama_vocab_bos": (_int, (_void,)),
    "llama_vocab_eos": (_int, (_void,)),
    "llama_vocab_get_attr": (_int, (_void, _int)),
    "llama_vocab_get_text": (_text, (_void, _int)),
    "llama_vocab_is_eog": (_bool, (_void, _int)),
    "llama_vocab_n_tokens": (_int, (_void,)),
    "llama_vocab_type": (_int, (_void,)),
}
"""Each function's result and arguments."""


class CApi:
    """llama.cpp's functions as attributes, with the types and constants that their callers need.

    `address` returns the address of a function of llama.cpp or ggml.
    """

    LLAMA_STATE_SEQ_MAGIC = 0x67677371
    LLAMA_STATE_SEQ_VERSION = 3
    llama_token = llama_token
    llama_log_callback = llama_log_callback
    ggml_backend_sched_eval_callback = ggml_backend_sched_eval_callback

    def __init__(self, address: Callable[[str], int]) -> None:
        for name, (result, arguments) in FUNCTIONS.items():
            # Lets go of the interpreter's lock, as ctypes' own functions do.
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(address(name)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"lowtide does not declare {name} of llama.cpp")
