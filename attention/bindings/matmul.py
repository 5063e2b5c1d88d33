"""Our matrix kernels called on arrays, outside any graph: what packing, tests and measurements use.

Knows no model and no file. Inside a graph the same kernels are called by `llama_hook`.

Writes packed GGUF files (`models.packed_gguf`) with our kernels' packing, a slice at a time.

Writes the packed matrices of an ONNX graph into one file, with our kernels' packing, a slice at a time.

The file begins with `ALIGNMENT` bytes: a line that says what it is, and a digest of the data behind it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lowtide.attention.bindings.library import native_library
from lowtide.models.atomic_file import whole_file
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.fingerprint import samples_digest
from lowtide.models.gguf.reader import TYPE_NUMBERS, GgufContents, TensorInfo
from lowtide.models.gguf.repacked import data_digest, matrices, repacked_header
from lowtide.models.onnx.read_spec import ALIGNMENT, RepackPlan
from lowtide.models.onnx.rewrite.matmul_nodes import TILE_ROWS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MATMUL_KERNELS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable")


class MatrixView(ctypes.Structure):
    """The C++ `PackedMatrix`, field for field: `tiles` is an address that somebody keeps."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "format num_rows num_columns".split()),
        ("tiles", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class RepackedArray:
    """A matrix of (num_rows, num_columns) packed: `tiles` are as many bytes as ggml's blocks were."""

    type_name: str
    num_rows: int
    num_columns: int
    tiles: NDArray[np.uint8]

    def _matrix(self) -> MatrixView:
        number = TYPE_NUMBERS[self.type_name]
        return MatrixView(number, self.num_rows, self.num_columns, self.tiles.ctypes.data)


def can_repack(type_name: str, num_rows: int, num_columns: int) -> bool:
    """Whether such a matrix has a packed form: whole blocks (of floats, 32 columns), rows in sixteens."""
    return _repacked_bytes(type_name, num_rows, num_columns) > 0


def repack_rows(
    type_name: str, rows: bytearray, num_rows: int, num_columns: int, tiles: bytearray
) -> None:
    """Pack whole panels, 16 rows each, from ggml's blocks into `tiles`, which has as many bytes.

    Raises `ValueError` where these bytes are no such rows.
    """
    num_bytes = _repacked_bytes(type_name, num_rows, num_columns)
    if not num_bytes or min(len(rows), len(tiles)) < num_bytes:
        raise ValueError(
            f"{len(rows)} bytes are no {num_rows} rows of {num_columns} in {type_name}"
        )
    source = (ctypes.c_char * num_bytes).from_buffer(rows)
    target = (ctypes.c_char * num_bytes).from_buffer(tiles)
    _library().lowtide_pack(TYPE_NUMBERS[type_name], source, num_rows, num_columns, target)


def repack_array(type_name: str, rows: NDArray[np.uint8], num_columns: int) -> RepackedArray:
    """Pack (num_rows, bytes of a row), in ggml's blocks; raises `BadOption` where they cannot be packed."""
    import numpy as np

    if not can_repack(type_name, len(rows), num_columns):
        raise BadOption(f"{len(rows)} rows of {num_columns} in {type_name} have no packed form")
    tiles = bytearray(rows.nbytes)
    repack_rows(type_name, bytearray(rows.tobytes()), len(rows), num_columns, tiles)
    return RepackedArray(type_name, len(rows), num_columns, np.frombuffer(tiles, np.uint8))


def unpack_row(packed: RepackedArray, row: int) -> NDArray[np.float32]:
    """Return row `row` of the matrix, (num_columns,)."""
    import numpy as np

    out = np.empty(packed.num_columns, np.float32)
    if _library().lowtide_unpack_row(ctypes.byref(packed._matrix()), row, out.ctypes.data):
        raise IndexError(f"row {row} of {packed.num_rows}")
    return out


def multiply(
    packed: RepackedArray,
    rows: NDArray[np.float32],
    *,
    kernels: str | None = None,
    threads: int = 1,
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
    matrices: Sequence[RepackedArray],
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


def usable_matmul_kernels() -> tuple[str, ...]:
    """Return the names of the kernel sets that this build and processor have, the best first."""
    return tuple(name for name in MATMUL_KERNELS if _library().lowtide_has_products(name.encode()))


def _repacked_bytes(type_name: str, num_rows: int, num_columns: int) -> int:
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


SLICE_BYTES = 1 << 20
"""What is read, and written, at once."""

Progress = Callable[[int], None]
"""Told of bytes, as they are written."""


def repackable(contents: GgufContents) -> list[TensorInfo]:
    """Return the tensors of a file that would be packed."""
    return [
        tensor
        for tensor in matrices(contents.tensors)
        if can_repack(tensor.type_name, tensor.shape[1], tensor.shape[0])
    ]


def write_repacked(source: GgufContents, target: Path, component: str, progress: Progress) -> None:
    """Write `source` packed to `target`, which is whole or not there.

    `component` is the fingerprint of the files that it belongs to. Raises `OSError`, with nothing left behind,
    where the system cannot write it, and `ValueError` where its header cannot be laid out.
    """
    packed = repackable(source)
    header = repacked_header(source, packed, component)
    names = {tensor.name for tensor in packed}
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out, source.path.open("rb") as file:
        out.write(header.start)
        for old, new in zip(source.tensors, header.tensors, strict=True):
            out.write(b"\0" * (len(header.start) + new.offset - out.tell()))
            file.seek(source.data_start + old.offset)
            _copy(file, out, old, progress, is_repacked_file=old.name in names)
        out.flush()
        digest = data_digest(Path(out.name), len(header.start))
        out.seek(header.digest_offset)
        out.write(digest.encode())


def _copy(
    file: BinaryIO, out: BinaryIO, tensor: TensorInfo, progress: Progress, *, is_repacked_file: bool
) -> None:
    num_columns, num_rows = (*tensor.shape, 1)[:2]
    row_bytes = tensor.num_bytes // num_rows if is_repacked_file else 1
    step = max(SLICE_BYTES // row_bytes // TILE_ROWS, 1) * TILE_ROWS * row_bytes
    for begin in range(0, tensor.num_bytes, step):
        rows = bytearray(file.read(min(step, tensor.num_bytes - begin)))
        if len(rows) < min(step, tensor.num_bytes - begin):
            raise OSError(f"{file.name} ended while it was read")
        tiles = rows
        if is_repacked_file:
            tiles = bytearray(len(rows))
            repack_rows(tensor.type_name, rows, len(rows) // row_bytes, num_columns, tiles)
        out.write(tiles)
        progress(len(tiles))


LAYOUT = b"lowtide panels 1\n"
"""Counts the ways that matrices were laid out in."""


def write_tiles(form: RepackPlan, folder: Path, target: Path, progress: Progress) -> None:
    """Write the matrices, whose weights lie in `folder`, to `target`, which is whole or not there.

    Raises `OSError` where the system cannot write or read it, `BadModelFile` for weights that have no
    packed form.
    """
    *starts, end = form.offsets
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out:
        for matrix, start in zip(form.swap.products.matrices, starts, strict=True):
            out.seek(start)
            row_bytes = matrix.num_bytes // matrix.num_rows
            step = max(SLICE_BYTES // row_bytes // TILE_ROWS, 1) * TILE_ROWS
            for rows in matrix.ggml_rows(folder, step):
                tiles = bytearray(rows.nbytes)
                blocks = bytearray(rows.tobytes())
                repack_rows(matrix.type_name, blocks, len(rows), matrix.num_columns, tiles)
                out.write(tiles)
                progress(len(tiles))
        out.truncate(end)
        out.flush()
        digest = samples_digest([(Path(out.name), ALIGNMENT)])
        out.seek(0)
        out.write(_beginning(digest))


def is_valid_tile_file(path: Path, form: RepackPlan) -> bool:
    """Whether the file at `path` is as it was written for such matrices; False where there is none."""
    try:
        with path.open("rb") as file:
            beginning = file.read(ALIGNMENT)
        return path.stat().st_size == form.offsets[-1] and beginning == _beginning(
            samples_digest([(path, ALIGNMENT)])
        )
    except OSError:
        return False


def _beginning(digest: str) -> bytes:
    return (LAYOUT + digest.encode()).ljust(ALIGNMENT, b"\n")
