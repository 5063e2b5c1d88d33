"""Repacking of weights into 16-row tiles, the layout that lowtide's matmul kernels read.

The repacked files themselves are written by `runtime/backends/kernels/repack.py`.
"""

from __future__ import annotations

import ctypes

from lowtide.attention.bindings.library import native_library
from lowtide.models.gguf.header.reader import TYPE_NUMBERS

MATMUL_KERNELS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable")
"""Instruction sets of the matmul kernels, the fastest first."""


class MatrixView(ctypes.Structure):
    """The C++ `RepackedMatrix`, field for field; `tiles` is an address that must stay valid."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "format num_rows num_columns".split()),
        ("tiles", ctypes.c_void_p),
    ]


def can_repack(type_name: str, num_rows: int, num_columns: int) -> bool:
    """Whether such a matrix can be repacked: whole blocks (32 columns for floats), 16 rows a tile."""
    return _repacked_bytes(type_name, num_rows, num_columns) > 0


def matmul_kernels() -> str:
    """Return the instruction set of the matmul kernels in use: the fastest that this processor has."""
    library = _library()
    library.lowtide_has_matmul_kernels.argtypes = [ctypes.c_char_p]
    return next(
        name for name in MATMUL_KERNELS if library.lowtide_has_matmul_kernels(name.encode())
    )


def repack_rows(
    type_name: str, rows: bytearray, num_rows: int, num_columns: int, tiles: bytearray
) -> None:
    """Repack whole tiles of 16 rows from ggml's blocks into `tiles`, which has as many bytes.

    Raises `ValueError` if `rows` is too short or cannot be repacked.
    """
    num_bytes = _repacked_bytes(type_name, num_rows, num_columns)
    if not num_bytes or min(len(rows), len(tiles)) < num_bytes:
        raise ValueError(
            f"{len(rows)} bytes are not {num_rows} rows of {num_columns} in {type_name}"
        )
    source = (ctypes.c_char * num_bytes).from_buffer(rows)
    target = (ctypes.c_char * num_bytes).from_buffer(tiles)
    _library().lowtide_repack(TYPE_NUMBERS[type_name], source, num_rows, num_columns, target)


def _repacked_bytes(type_name: str, num_rows: int, num_columns: int) -> int:
    number = TYPE_NUMBERS.get(type_name, -1)
    num_bytes: int = _library().lowtide_repacked_bytes(number, num_rows, num_columns)
    return num_bytes


def _library() -> ctypes.CDLL:
    library = native_library()
    sizes = (ctypes.c_int64, ctypes.c_int64)
    library.lowtide_repacked_bytes.restype = ctypes.c_size_t
    library.lowtide_repacked_bytes.argtypes = [ctypes.c_int32, *sizes]
    library.lowtide_repack.argtypes = [ctypes.c_int32, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return library
