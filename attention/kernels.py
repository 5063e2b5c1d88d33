"""Our attention kernels called on arrays, outside any graph: what tests and measurements use.

Knows no model. Inside a graph the same kernels are called by `graph_hook`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.native_library import native_library
from lowtide.attention.selection_rule import SelectionRule
from lowtide.models.errors import BadOption, LowtideError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KERNEL_SETS = ("avx512", "avx2", "neon", "portable")
KV_TYPES = {"f16": 0, "q8_0": 1, "q4_0": 2, "f32": 3}


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
        ("sinks", ctypes.c_void_p),
        ("selected", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("first_scored_row", ctypes.c_int),
        ("scores_stride", ctypes.c_int),
        ("rounded", ctypes.c_int),
        ("states", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """One attention node as arrays; last axes are contiguous.

    `q` (rows, heads, key_size); `k`, `v` (cells, kv_heads, stored row), float16 or the bytes of quantised
    blocks; `mask` (rows, cells), added to the scaled scores. `sinks` (heads,) are scores without values.
    `rounded` lets more than 32 rows be multiplied in bfloat16, where the kernels can.
    """

    q: NDArray[np.float32]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    mask: NDArray[np.float16]
    value_size: int
    scale: float
    softcap: float = 0.0
    kv_type: str = "f16"
    sinks: NDArray[np.float32] | None = None
    rounded: bool = False

    def problem(self, out: NDArray[np.float32], cells: NDArray[np.int32] | None) -> _Problem:
        """Return the C++ struct over these arrays, which must outlive it."""
        num_rows, num_heads, key_size = self.q.shape
        num_cells, num_kv_heads = self.k.shape[:2]
        return _Problem(
            self.q.ctypes.data, self.q.strides[0], self.q.strides[1],
            self.k.ctypes.data, self.k.strides[0], self.k.strides[1],
            self.v.ctypes.data, self.v.strides[0], self.v.strides[1],
            self.mask.ctypes.data, self.mask.strides[0],
            out.ctypes.data, out.strides[0], out.strides[1],
            KV_TYPES[self.kv_type], KV_TYPES[self.kv_type],
            num_rows, num_heads, num_kv_heads, num_cells if cells is None else len(cells),
            key_size, self.value_size, self.scale, self.softcap,
            None if self.sinks is None else self.sinks.ctypes.data,
            None if cells is None else cells.ctypes.data,
            None, None, 0, 0, self.rounded, None,
        )  # fmt: skip


def attend(
    inputs: AttentionInputs,
    *,
    cells: NDArray[np.int32] | None = None,
    kernels: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return exact attention, shape (rows, heads, value_size), to `cells` (ascending) or to every cell.

    Raises `LowtideError` where this build and processor have no such `kernels`.
    """
    import numpy as np

    out = np.zeros((*inputs.q.shape[:2], inputs.value_size), np.float32)
    problem = inputs.problem(out, cells)
    failure = native_library().lowtide_attend(ctypes.byref(problem), _name(kernels), threads)
    _check(failure, inputs, kernels)
    return out


def select(
    inputs: AttentionInputs, rule: SelectionRule, *, kernels: str | None = None, threads: int = 1
) -> NDArray[np.int32] | None:
    """Return the cells that a selection layer chooses, ascending; None where attention stays dense."""
    import numpy as np

    out = np.zeros((*inputs.q.shape[:2], inputs.value_size), np.float32)
    cells, count = np.zeros(len(inputs.k), np.int32), ctypes.c_int32()
    problem = inputs.problem(out, None)
    failure = native_library().lowtide_select(
        ctypes.byref(problem),
        ctypes.byref(rule),
        _name(kernels),
        threads,
        ctypes.c_void_p(cells.ctypes.data),
        ctypes.byref(count),
    )
    _check(failure, inputs, kernels)
    return None if count.value < 0 else cells[: count.value]


def _name(kernels: str | None) -> bytes | None:
    return kernels.encode() if kernels else None


def _check(failure: int, inputs: AttentionInputs, kernels: str | None) -> None:
    if failure == 2:
        raise BadOption(
            f"{inputs.q.shape[1]} heads over {inputs.k.shape[1]} of size {inputs.q.shape[2]} and "
            f"{inputs.value_size} are no shape of the kernels: whole groups of heads, of a multiple of "
            "16 up to 256, are wanted"
        )
    if failure:
        raise LowtideError(f"this build and processor have no {kernels} kernels")


def usable_kernel_sets() -> tuple[str, ...]:
    """Return the kernel sets that this build and processor have, the best one first."""
    import numpy as np

    one = np.zeros((1, 1, 16), np.float32)
    kv = np.zeros((1, 1, 16), np.float16)
    mask = np.zeros((1, 1), np.float16)
    inputs = AttentionInputs(q=one, k=kv, v=kv, mask=mask, value_size=16, scale=1.0)
    found = []
    for name in KERNEL_SETS:
        try:
            attend(inputs, kernels=name)
        except LowtideError:
            continue
        found.append(name)
    return tuple(found)
