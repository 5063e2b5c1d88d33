"""Our attention kernels called on arrays, outside any graph: what tests and measurements use.

Knows no model. Inside a graph the same kernels are called by `graph_hook`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lowtide.attention.native_library import native_library
from lowtide.models.errors import BadOption, LowtideError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KERNEL_SETS = ("avx512", "avx2", "neon", "portable")
KV_TYPES = {"f16": 0, "q8_0": 1, "q4_0": 2}


class _Problem(ctypes.Structure):
    """The C++ `AttentionProblem`, field for field."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_row_stride", ctypes.c_size_t),
        ("q_head_stride", ctypes.c_size_t),
        ("k", ctypes.c_void_p),
        ("k_key_stride", ctypes.c_size_t),
        ("k_head_stride", ctypes.c_size_t),
        ("v", ctypes.c_void_p),
        ("v_key_stride", ctypes.c_size_t),
        ("v_head_stride", ctypes.c_size_t),
        ("mask", ctypes.c_void_p),
        ("mask_row_stride", ctypes.c_size_t),
        ("out", ctypes.c_void_p),
        ("out_row_stride", ctypes.c_size_t),
        ("out_head_stride", ctypes.c_size_t),
        ("k_type", ctypes.c_int),
        ("v_type", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("num_keys", ctypes.c_int),
        ("key_size", ctypes.c_int),
        ("value_size", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def attend(
    q: NDArray[np.float32],
    k: NDArray[np.generic],
    v: NDArray[np.generic],
    mask: NDArray[np.float16],
    *,
    value_size: int,
    scale: float,
    softcap: float = 0.0,
    kv_type: str = "f16",
    kernels: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return exact attention, shape (rows, heads, value_size).

    `q` (rows, heads, key_size); `k`, `v` (keys, kv_heads, stored row), float16 or the bytes of quantised
    blocks; `mask` (rows, keys), added to the scaled scores. Last axes are contiguous. Raises
    `LowtideError` where this build and processor have no such `kernels`.
    """
    import numpy as np

    num_rows, num_heads, key_size = q.shape
    out = np.zeros((num_rows, num_heads, value_size), np.float32)
    problem = _Problem(
        q.ctypes.data, q.strides[0], q.strides[1],
        k.ctypes.data, k.strides[0], k.strides[1],
        v.ctypes.data, v.strides[0], v.strides[1],
        mask.ctypes.data, mask.strides[0],
        out.ctypes.data, out.strides[0], out.strides[1],
        KV_TYPES[kv_type], KV_TYPES[kv_type],
        num_rows, num_heads, k.shape[1], k.shape[0], key_size, value_size,
        scale, softcap,
    )  # fmt: skip
    name = kernels.encode() if kernels else None
    failure = native_library().lowtide_attend(ctypes.byref(problem), name, threads)
    if failure == 2:
        raise BadOption(
            f"{num_heads} heads over {k.shape[1]} of size {key_size} and {value_size} are no shape of the "
            "kernels: whole groups of heads, of a multiple of 16 up to 256, are wanted"
        )
    if failure:
        raise LowtideError(f"this build and processor have no {kernels} kernels")
    return out


def usable_kernel_sets() -> tuple[str, ...]:
    """Return the kernel sets that this build and processor have, the best one first."""
    import numpy as np

    one = np.zeros((1, 1, 16), np.float32)
    kv = np.zeros((1, 1, 16), np.float16)
    found = []
    for name in KERNEL_SETS:
        try:
            attend(
                one, kv, kv, np.zeros((1, 1), np.float16), value_size=16, scale=1.0, kernels=name
            )
        except LowtideError:
            continue
        found.append(name)
    return tuple(found)
