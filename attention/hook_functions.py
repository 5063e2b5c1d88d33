"""The graph hook's C functions and structs, as `native/graph_hook.h` declares them."""

from __future__ import annotations

import ctypes

from lowtide.models.llama_library import llama_library


class _GgmlFunctions(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "init free new_tensor_4d view_tensor custom_4d set_name op_name get_type_traits_cpu row_size "
            "backend_buffer_is_host"
        ).split()
    ]


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "layers_ours layers_theirs nodes_ours nodes_theirs nanoseconds scratch_bytes keys_read "
            "keys_held weight_bytes_given_back products_sliced products_packed packed_refused".split()
        )
    ]


def ggml_functions() -> _GgmlFunctions:
    """Return the addresses of what the hook calls of ggml."""
    library = llama_library()
    names = [field[0] for field in _GgmlFunctions._fields_]
    return _GgmlFunctions(*(library.address(f"ggml_{name}") for name in names))


def declare_hook(library: ctypes.CDLL) -> None:
    """Declare the hook's functions on the native library."""
    pointer = ctypes.c_void_p
    library.lowtide_hook_new.restype = pointer
    library.lowtide_hook_new.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.lowtide_hook_free.argtypes = [pointer]
    library.lowtide_hook_free.restype = None
    library.lowtide_hook_set_active.argtypes = [pointer, ctypes.c_int]
    library.lowtide_hook_set_active.restype = None
    library.lowtide_hook_counts.argtypes = [pointer]
    library.lowtide_hook_counts.restype = _Counts
    library.lowtide_hook_kernels.argtypes = [pointer]
    library.lowtide_hook_kernels.restype = ctypes.c_char_p
    library.lowtide_hook_clock.argtypes = [pointer]
    library.lowtide_hook_clock.restype = pointer
    library.lowtide_hook_policy.argtypes = [pointer]
    library.lowtide_hook_policy.restype = pointer
    library.lowtide_hook_stream_weights.argtypes = [
        pointer,
        pointer,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    library.lowtide_hook_score_prompt.argtypes = [pointer, ctypes.c_int, pointer, ctypes.c_int]
    library.lowtide_hook_score_prompt.restype = None
    library.lowtide_hook_set_parts.argtypes = [
        pointer,
        ctypes.c_int,
        ctypes.c_int,
        pointer,
        pointer,
        pointer,
    ]
    library.lowtide_hook_parts_refused.argtypes = [pointer]
    library.lowtide_hook_parts_refused.restype = ctypes.c_int64
    library.lowtide_hook_copy_cell.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.lowtide_hook_read_packed.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.lowtide_hook_prompt_scores.argtypes = [pointer, pointer, ctypes.c_int]
    library.lowtide_hook_can_round.argtypes = [pointer]
