"""Our matrix kernels called on arrays, outside any graph: what packing, tests and measurements use.

Knows no model and no file. Inside a graph the same kernels are called by `graph_hook`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.native_library import native_library
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf_reader import TYPE_NUMBERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PRODUCT_SETS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable")


class MatrixView(ctypes.Structure):
    """The C++ `PackedMatrix`, field for field: `panels` is an address that somebody keeps."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "format num_rows num_columns".split()),
        ("panels", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class PackedArray:
    """A matrix of (num_rows, num_columns) packed: `panels` are as many bytes as ggml's blocks were."""

    type_name: str
    num_rows: int
    num_columns: int
    panels: NDArray[np.uint8]

    def _matrix(self) -> MatrixView:
        number = TYPE_NUMBERS[self.type_name]
        return MatrixView(number, self.num_rows, self.num_columns, self.panels.ctypes.data)


def can_pack(type_name: str, num_rows: int, num_columns: int) -> bool:
    """Whether such a matrix has a packed form: whole blocks (of floats, 32 columns), rows in sixteens."""
    return _packed_bytes(type_name, num_rows, num_columns) > 0


def pack_rows(
    type_name: str, rows: bytearray, num_rows: int, num_columns: int, panels: bytearray
) -> None:
    """Pack whole panels, 16 rows each, from ggml's blocks into `panels`, which has as many bytes.

    Raises `ValueError` where these bytes are no such rows.
    """
    num_bytes = _packed_bytes(type_name, num_rows, num_columns)
    if not num_bytes or min(len(rows), len(panels)) < num_bytes:
        raise ValueError(
            f"{len(rows)} bytes are no {num_rows} rows of {num_columns} in {type_name}"
        )
    source = (ctypes.c_char * num_bytes).from_buffer(rows)
    target = (ctypes.c_char * num_bytes).from_buffer(panels)
    _library().lowtide_pack(TYPE_NUMBERS[type_name], source, num_rows, num_columns, target)


def pack_array(type_name: str, rows: NDArray[np.uint8], num_columns: int) -> PackedArray:
    """Pack (num_rows, bytes of a row), in ggml's blocks; raises `BadOption` where they cannot be packed."""
    import numpy as np

    if not can_pack(type_name, len(rows), num_columns):
        raise BadOption(f"{len(rows)} rows of {num_columns} in {type_name} have no packed form")
    panels = bytearray(rows.nbytes)
    pack_rows(type_name, bytearray(rows.tobytes()), len(rows), num_columns, panels)
    return PackedArray(type_name, len(rows), num_columns, np.frombuffer(panels, np.uint8))


def unpack_row(packed: PackedArray, row: int) -> NDArray[np.float32]:
    """Return row `row` of the matrix, (num_columns,)."""
    import numpy as np

    out = np.empty(packed.num_columns, np.float32)
    if _library().lowtide_unpack_row(ctypes.byref(packed._matrix()), row, out.ctypes.data):
        raise IndexError(f"row {row} of {packed.num_rows}")
    return out


def multiply(
    packed: PackedArray, rows: NDArray[np.float32], *, kernels: str | None = None, threads: int = 1
) -> NDArray[np.float32]:
    """Return (rows, num_rows): each of `rows`, (rows, num_columns), times the matrix.

    The rows stay float32 where weights are F16 or BF16; else they are rounded to 8 bits in blocks of 32, as
    ggml does. `kernels` names an instruction set; None takes the best.
    """
    import numpy as np

    out = np.empty((1, len(rows), packed.num_rows), np.float32)
    multiply_in_turn([packed], rows, out, kernels=kernels, threads=threads)
    product: NDArray[np.float32] = out[0]
    return product


def multiply_in_turn(
    matrices: Sequence[PackedArray],
    rows: NDArray[np.float32],
    out: NDArray[np.float32],
    *,
    kernels: str | None = None,
    threads: int = 1,
) -> None:
    """Multiply `rows` by one matrix after another, all of one shape, with threads that are made once.

    As `multiply` does; `out` is (matrices, rows, num_rows).
    """
    import numpy as np

    rows = np.ascontiguousarray(rows, np.float32)
    if rows.ndim != 2 or any(matrix.num_columns != rows.shape[1] for matrix in matrices):
        raise ValueError(f"rows are {rows.shape}: as many columns as every matrix are wanted")
    expected = (len(matrices), len(rows), matrices[0].num_rows)
    if out.shape != expected or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} of {out.shape}: float32 of {expected} is wanted")
    name = kernels.encode() if kernels else None
    packed = (MatrixView * len(matrices))(*(matrix._matrix() for matrix in matrices))
    failed = _library().lowtide_multiply(
        packed, len(packed), rows.ctypes.data, len(rows), out.ctypes.data, name, threads
    )
    if failed:
        raise LowtideError(f"{len(rows)} rows cannot be multiplied with the kernels {kernels!r}")


def usable_product_sets() -> tuple[str, ...]:
    """Return the names of the kernel sets that this build and processor have, the best first."""
    return tuple(name for name in PRODUCT_SETS if _library().lowtide_has_products(name.encode()))


def _packed_bytes(type_name: str, num_rows: int, num_columns: int) -> int:
    number = TYPE_NUMBERS.get(type_name, -1)
    num_bytes: int = _library().lowtide_packed_bytes(number, num_rows, num_columns)
    return num_bytes


def _library() -> ctypes.CDLL:
    library = native_library()
    pointer = ctypes.c_void_p
    library.lowtide_packed_bytes.restype = ctypes.c_size_t
    library.lowtide_packed_bytes.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
    sizes = (ctypes.c_int64, ctypes.c_int64)
    library.lowtide_pack.argtypes = [ctypes.c_int32, pointer, *sizes, pointer]
    library.lowtide_unpack_row.argtypes = [pointer, ctypes.c_int, pointer]
    library.lowtide_has_products.argtypes = [ctypes.c_char_p]
    library.lowtide_multiply.argtypes = [
        *(pointer, ctypes.c_int, pointer, ctypes.c_int, pointer),
        *(ctypes.c_char_p, ctypes.c_int),
    ]
    return library
