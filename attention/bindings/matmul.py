"""Repacking of weights into 16-row tiles, the layout that lowtide's matmul kernels read.

Writes a repacked copy of a GGUF file (`models.gguf.repacked`), or the repacked matrices of an ONNX graph as
one file of tiles, a slice at a time. The file of tiles begins with `ALIGNMENT` bytes: a line that names the
layout, and a digest of the data behind it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lowtide.attention.bindings.library import native_library
from lowtide.models.atomic_file import whole_file
from lowtide.models.fingerprint import samples_digest
from lowtide.models.gguf.reader import TYPE_NUMBERS, GgufContents, TensorInfo
from lowtide.models.gguf.repacked import data_digest, matrices, repacked_header
from lowtide.models.onnx.read_spec import ALIGNMENT, RepackPlan
from lowtide.models.onnx.rewrite.matmul_nodes import TILE_ROWS


class MatrixView(ctypes.Structure):
    """The C++ `PackedMatrix`, field for field; `tiles` is an address that must stay valid."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "format num_rows num_columns".split()),
        ("tiles", ctypes.c_void_p),
    ]


def can_repack(type_name: str, num_rows: int, num_columns: int) -> bool:
    """Whether such a matrix can be repacked: whole blocks (32 columns for floats), 16 rows a tile."""
    return _repacked_bytes(type_name, num_rows, num_columns) > 0


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


SLICE_BYTES = 1 << 20
"""Bytes that are read and written at once."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


def repackable(contents: GgufContents) -> list[TensorInfo]:
    """Return the tensors of a file that can be repacked."""
    return [
        tensor
        for tensor in matrices(contents.tensors)
        if can_repack(tensor.type_name, tensor.shape[1], tensor.shape[0])
    ]


def write_repacked(source: GgufContents, target: Path, component: str, progress: Progress) -> None:
    """Write a repacked copy of `source` to `target`, atomically.

    `component` is the fingerprint of the files that the copy belongs to. Raises `OSError`, with nothing left
    behind, if the system cannot write it, and `ValueError` if its header cannot be laid out.
    """
    tensors = repackable(source)
    header = repacked_header(source, tensors, component)
    names = {tensor.name for tensor in tensors}
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out, source.path.open("rb") as file:
        out.write(header.start)
        for old, new in zip(source.tensors, header.tensors, strict=True):
            out.write(b"\0" * (len(header.start) + new.offset - out.tell()))
            file.seek(source.data_start + old.offset)
            _copy(file, out, old, progress, repack=old.name in names)
        out.flush()
        digest = data_digest(Path(out.name), len(header.start))
        out.seek(header.digest_offset)
        out.write(digest.encode())


def _copy(
    file: BinaryIO, out: BinaryIO, tensor: TensorInfo, progress: Progress, *, repack: bool
) -> None:
    num_columns, num_rows = (*tensor.shape, 1)[:2]
    row_bytes = tensor.num_bytes // num_rows if repack else 1
    step = max(SLICE_BYTES // row_bytes // TILE_ROWS, 1) * TILE_ROWS * row_bytes
    for begin in range(0, tensor.num_bytes, step):
        rows = bytearray(file.read(min(step, tensor.num_bytes - begin)))
        if len(rows) < min(step, tensor.num_bytes - begin):
            raise OSError(f"{file.name} ended while it was read")
        tiles = rows
        if repack:
            tiles = bytearray(len(rows))
            repack_rows(tensor.type_name, rows, len(rows) // row_bytes, num_columns, tiles)
        out.write(tiles)
        progress(len(tiles))


LAYOUT = b"lowtide panels 1\n"
"""Raise the number when the layout changes."""


def write_tiles(form: RepackPlan, folder: Path, target: Path, progress: Progress) -> None:
    """Write the repacked matrices of an ONNX graph, with its weights in `folder`, to `target`, atomically.

    Raises `OSError` if the system cannot read or write them, `BadModelFile` for weights that cannot be
    repacked.
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
    """Whether the file at `path` holds these matrices undamaged; False if there is no file."""
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
