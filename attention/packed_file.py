"""Writes packed GGUF files (`models.packed_gguf`) with our kernels' packing, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lowtide.attention.product_kernels import can_pack, pack_rows
from lowtide.models.gguf_reader import GgufContents, TensorInfo
from lowtide.models.packed_gguf import data_digest, matrices, packed_header
from lowtide.models.whole_file import whole_file

SLICE_BYTES = 1 << 20
"""What is read, and written, at once."""
PANEL_ROWS = 16

Progress = Callable[[int], None]
"""Told of bytes, as they are written."""


def packable(contents: GgufContents) -> list[TensorInfo]:
    """Return the tensors of a file that would be packed."""
    return [
        tensor
        for tensor in matrices(contents.tensors)
        if can_pack(tensor.type_name, tensor.shape[1], tensor.shape[0])
    ]


def write_packed(source: GgufContents, target: Path, owner: str, progress: Progress) -> None:
    """Write `source` packed to `target`, which is whole or not there.

    `owner` is the fingerprint of the files that it belongs to. Raises `OSError`, with nothing left behind,
    where the system cannot write it, and `ValueError` where its header cannot be laid out.
    """
    packed = packable(source)
    header = packed_header(source, packed, owner)
    names = {tensor.name for tensor in packed}
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out, source.path.open("rb") as file:
        out.write(header.start)
        for old, new in zip(source.tensors, header.tensors, strict=True):
            out.write(b"\0" * (len(header.start) + new.offset - out.tell()))
            file.seek(source.data_start + old.offset)
            _copy(file, out, old, progress, is_packed=old.name in names)
        out.flush()
        digest = data_digest(Path(out.name), len(header.start))
        out.seek(header.digest_offset)
        out.write(digest.encode())


def _copy(
    file: BinaryIO, out: BinaryIO, tensor: TensorInfo, progress: Progress, *, is_packed: bool
) -> None:
    num_columns, num_rows = (*tensor.shape, 1)[:2]
    row_bytes = tensor.num_bytes // num_rows if is_packed else 1
    step = max(SLICE_BYTES // row_bytes // PANEL_ROWS, 1) * PANEL_ROWS * row_bytes
    for begin in range(0, tensor.num_bytes, step):
        rows = bytearray(file.read(min(step, tensor.num_bytes - begin)))
        if len(rows) < min(step, tensor.num_bytes - begin):
            raise OSError(f"{file.name} ended while it was read")
        panels = rows
        if is_packed:
            panels = bytearray(len(rows))
            pack_rows(tensor.type_name, rows, len(rows) // row_bytes, num_columns, panels)
        out.write(panels)
        progress(len(panels))
