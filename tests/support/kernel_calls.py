"""lowtide's kernels called on numpy arrays, outside any graph: attention, delta's layers, and matmuls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from native_build import test_library
from numpy.typing import NDArray

from lowtide.attention.bindings.matmul import MatrixView, can_repack, repack_rows
from lowtide.attention.bindings.structs import (
    DeltaBlocksRule,
    DeltaRowsRule,
    ScoreCounts,
    SelectionRule,
)
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.reader import TYPE_NUMBERS

KV_TYPES = {"f16": 0, "q8_0": 1, "q4_0": 2, "f32": 3}
MATMUL_KERNELS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable")


@functools.cache
def test_kernels() -> ctypes.CDLL:
    """Load the test library: the C++ core with entry points that take arrays."""
    library = ctypes.CDLL(str(test_library()))
    library.lowtide_test_problem_bytes.restype = ctypes.c_size_t
    if library.lowtide_test_problem_bytes() != ctypes.sizeof(_Problem):
        raise RuntimeError(
            "AttentionProblem has other fields in C++ than in tests/support/kernel_calls.py"
        )
    return library


test_kernels.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


class UnsupportedShape(LowtideError):
    """The kernels do not support these head sizes or numbers of heads."""


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
        ("head_dim", ctypes.c_int),
        ("value_dim", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("selected", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("first_scored_row", ctypes.c_int),
        ("scores_stride", ctypes.c_int),
        ("use_bf16", ctypes.c_int),
        ("states", ctypes.c_void_p),
        ("following", ctypes.c_void_p),
        ("following_begin", ctypes.c_int),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """One attention node as arrays; last axes are contiguous.

    `q` (queries, heads, head_dim); `k`, `v` (slots, kv_heads, head_dim or value_dim), float16 or the bytes
    of quantised blocks; `mask` (queries, slots) is added to the scaled scores. `sinks` (heads,) are scores
    without values. `use_bf16` multiplies more than 32 queries in bfloat16, if the kernels can.
    """

    q: NDArray[np.float32]
    k: NDArray[np.generic]
    v: NDArray[np.generic]
    mask: NDArray[np.float16]
    value_dim: int
    scale: float
    softcap: float = 0.0
    kv_type: str = "f16"
    sinks: NDArray[np.float32] | None = None
    use_bf16: bool = False

    def problem(self, out: NDArray[np.float32], slots: NDArray[np.int32] | None) -> _Problem:
        """Return the C++ struct over these arrays, which must outlive it."""
        num_rows, num_heads, head_dim = self.q.shape
        num_slots, num_kv_heads = self.k.shape[:2]
        return _Problem(
            self.q.ctypes.data, self.q.strides[0], self.q.strides[1],
            self.k.ctypes.data, self.k.strides[0], self.k.strides[1],
            self.v.ctypes.data, self.v.strides[0], self.v.strides[1],
            self.mask.ctypes.data, self.mask.strides[0],
            out.ctypes.data, out.strides[0], out.strides[1],
            KV_TYPES[self.kv_type], KV_TYPES[self.kv_type],
            num_rows, num_heads, num_kv_heads, num_slots if slots is None else len(slots),
            head_dim, self.value_dim, self.scale, self.softcap,
            None if self.sinks is None else self.sinks.ctypes.data,
            None if slots is None else slots.ctypes.data,
            None, None, 0, 0, self.use_bf16, None, None, 0,
        )  # fmt: skip


def attend(
    inputs: AttentionInputs,
    *,
    slots: NDArray[np.int32] | None = None,
    kernels: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return exact attention (queries, heads, value_dim) to `slots`, ascending, or to every slot.

    Raises `LowtideError` if this build and processor do not have these `kernels`.
    """
    out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
    problem = inputs.problem(out, slots)
    failure = test_kernels().lowtide_test_attend(ctypes.byref(problem), _name(kernels), threads)
    _check(failure, kernels)
    return out


def select(
    inputs: AttentionInputs, rule: SelectionRule, *, kernels: str | None = None, threads: int = 1
) -> NDArray[np.int32] | None:
    """Return the slots that a selection layer selects, ascending; None if attention stays dense."""
    out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
    slots, count = np.zeros(len(inputs.k), np.int32), ctypes.c_int32()
    problem = inputs.problem(out, None)
    failure = test_kernels().lowtide_test_select(
        ctypes.byref(problem),
        ctypes.byref(rule),
        _name(kernels),
        threads,
        ctypes.c_void_p(slots.ctypes.data),
        ctypes.byref(count),
    )
    _check(failure, kernels)
    return None if count.value < 0 else slots[: count.value]


def _name(kernels: str | None) -> bytes | None:
    return kernels.encode() if kernels else None


def _check(failure: int, kernels: str | None) -> None:
    if failure == 2:
        raise UnsupportedShape("the kernels do not support this shape")
    if failure:
        raise LowtideError(f"this build and processor have no {kernels} kernels")


class GroupedLayer:
    """One layer of delta by tokens, which keeps its groups from pass to pass; close it.

    Arguments as for `AttentionKernels.set_groups`, of one layer: `num_groups` and `score_bias` (kv_heads,),
    `scales` (kv_heads, head_dim). Raises `LowtideError` if a page cannot have so many groups.
    """

    def __init__(
        self,
        rule: DeltaRowsRule,
        num_groups: NDArray[np.uint8],
        score_bias: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = test_kernels()
        self._library.lowtide_test_delta_rows_new.restype = ctypes.c_void_p
        self._layer = self._library.lowtide_test_delta_rows_new(
            ctypes.byref(rule),
            ctypes.c_void_p(num_groups.ctypes.data),
            ctypes.c_void_p(score_bias.ctypes.data),
            ctypes.c_void_p(scales.ctypes.data),
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError("a page cannot have so many groups")

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> tuple[NDArray[np.float32], int]:
        """Attend with the queries of a pass; each sees a prefix of the cache, one slot more than the last.

        Returns the result (queries, heads, value_dim) and the mean over heads of how many keys and groups
        the last query attended to; -1, with zeros as the result, for another kind of mask.
        """
        out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
        problem, num_read = inputs.problem(out, None), ctypes.c_int()
        failure = self._library.lowtide_test_delta_rows_attend(
            ctypes.c_void_p(self._layer),
            ctypes.byref(problem),
            _name(kernels),
            threads,
            ctypes.byref(num_read),
        )
        _check(failure, kernels)
        return out, num_read.value

    def close(self) -> None:
        """Free the layer's groups; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_test_delta_rows_free(ctypes.c_void_p(self._layer))
            self._layer = None


class BlocksLayer:
    """One layer of delta by blocks, which keeps its stored blocks from pass to pass; close it.

    Arguments as for `BlockKernels.set_head_params`, of one layer: `thresholds` and `shares` (kv_heads,),
    `scales` (kv_heads, head_dim). Raises `LowtideError` for an unsupported block size.
    """

    def __init__(
        self,
        rule: DeltaBlocksRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        self._library = test_kernels()
        pointer = ctypes.c_void_p
        self._library.lowtide_test_delta_blocks_new.restype = pointer
        self._library.lowtide_test_delta_blocks_new.argtypes = [pointer] * 4 + [ctypes.c_int] * 2
        self._library.lowtide_test_delta_blocks_attend.argtypes = [
            *(pointer, pointer, ctypes.c_char_p, ctypes.c_int, pointer)
        ]
        self._library.lowtide_test_delta_blocks_free.argtypes = [pointer]
        self._library.lowtide_test_delta_blocks_free.restype = None
        self._layer = self._library.lowtide_test_delta_blocks_new(
            ctypes.byref(rule),
            thresholds.ctypes.data,
            shares.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if not self._layer:
            raise LowtideError(
                f"heads of {scales.shape[1]} channels cannot have blocks of {rule.block_size}"
            )
        self.counts = ScoreCounts()

    def attend(
        self, inputs: AttentionInputs, *, kernels: str | None = None, threads: int = 1
    ) -> NDArray[np.float32]:
        """Attend with the queries of a pass; each sees a prefix of the cache, one slot more than the last.

        Returns the result (queries, heads, value_dim), zeros for another kind of mask; `counts` adds up.
        """
        out = np.zeros((*inputs.q.shape[:2], inputs.value_dim), np.float32)
        problem = inputs.problem(out, None)
        failure = self._library.lowtide_test_delta_blocks_attend(
            self._layer,
            ctypes.byref(problem),
            _name(kernels),
            threads,
            ctypes.byref(self.counts),
        )
        _check(failure, kernels)
        return out

    def close(self) -> None:
        """Free the layer's blocks; closing twice is allowed."""
        if self._layer:
            self._library.lowtide_test_delta_blocks_free(self._layer)
            self._layer = None


@dataclass(frozen=True, slots=True)
class RepackedArray:
    """A repacked matrix of (num_rows, num_columns); `tiles` has as many bytes as ggml's blocks."""

    type_name: str
    num_rows: int
    num_columns: int
    tiles: NDArray[np.uint8]

    def view(self) -> MatrixView:
        """Return the C++ struct, which this must outlive."""
        number = TYPE_NUMBERS[self.type_name]
        return MatrixView(number, self.num_rows, self.num_columns, self.tiles.ctypes.data)


def repack_array(type_name: str, rows: NDArray[np.uint8], num_columns: int) -> RepackedArray:
    """Repack (num_rows, bytes of a row) in ggml's blocks; raises `ValueError` if that is impossible."""
    if not can_repack(type_name, len(rows), num_columns):
        raise ValueError(f"{len(rows)} rows of {num_columns} in {type_name} cannot be repacked")
    tiles = bytearray(rows.nbytes)
    repack_rows(type_name, bytearray(rows.tobytes()), len(rows), num_columns, tiles)
    return RepackedArray(type_name, len(rows), num_columns, np.frombuffer(tiles, np.uint8))


def unpack_row(matrix: RepackedArray, row: int) -> NDArray[np.float32]:
    """Return row `row` of the matrix, (num_columns,)."""
    out = np.empty(matrix.num_columns, np.float32)
    if _matmul_library().lowtide_test_dequantise_row(
        ctypes.byref(matrix.view()), row, out.ctypes.data
    ):
        raise IndexError(f"row {row} of {matrix.num_rows}")
    return out


def multiply(
    matrix: RepackedArray,
    rows: NDArray[np.float32],
    *,
    kernels: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return (rows, num_rows): each of `rows`, (rows, num_columns), times the matrix.

    The rows stay float32 for F16 and BF16 weights; else they are rounded to 8 bits in blocks of 32, as ggml
    does. `kernels` names an instruction set; None takes the fastest.
    """
    out = np.empty((1, len(rows), matrix.num_rows), np.float32)
    multiply_in_turn([matrix], rows, out, kernels=kernels, threads=threads)
    product: NDArray[np.float32] = out[0]
    return product


def multiply_in_turn(
    matrices: Sequence[RepackedArray],
    rows: NDArray[np.float32],
    out: NDArray[np.float32],
    *,
    kernels: str | None = None,
    threads: int = 1,
) -> None:
    """Multiply `rows` by one matrix after another, all of one shape, with threads that are started once.

    As `multiply` does; `out` is (matrices, rows, num_rows).
    """
    rows = np.ascontiguousarray(rows, np.float32)
    assert rows.ndim == 2 and all(matrix.num_columns == rows.shape[1] for matrix in matrices)
    assert out.shape == (len(matrices), len(rows), matrices[0].num_rows)
    assert out.dtype == np.float32 and out.flags.c_contiguous
    views = (MatrixView * len(matrices))(*(matrix.view() for matrix in matrices))
    failed = _matmul_library().lowtide_test_multiply(
        views, len(views), rows.ctypes.data, len(rows), out.ctypes.data, _name(kernels), threads
    )
    if failed:
        raise LowtideError(f"{len(rows)} rows cannot be multiplied with the kernels {kernels!r}")


def usable_matmul_kernels() -> tuple[str, ...]:
    """Return the names of the matmul kernels that this build and processor have, the fastest first."""
    library = _matmul_library()
    return tuple(
        name for name in MATMUL_KERNELS if library.lowtide_has_matmul_kernels(name.encode())
    )


def _matmul_library() -> ctypes.CDLL:
    library = test_kernels()
    pointer = ctypes.c_void_p
    library.lowtide_test_dequantise_row.argtypes = [pointer, ctypes.c_int, pointer]
    library.lowtide_has_matmul_kernels.argtypes = [ctypes.c_char_p]
    library.lowtide_test_multiply.argtypes = [
        *(pointer, ctypes.c_int, pointer, ctypes.c_int, pointer),
        *(ctypes.c_char_p, ctypes.c_int),
    ]
    return library
