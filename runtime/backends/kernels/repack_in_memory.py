"""Weights that are repacked in memory while the model loads, where no copy of them can be stored.

The matrices take as many bytes in tiles as before. So the mapping of the model's file is made private, and each matrix
is replaced by its tiles where it lies: the process takes no more memory, but these pages are its own and cannot be
read from the file again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lowtide.attention.bindings.matmul import repack_rows
from lowtide.memory.os.file_mappings import FileMap
from lowtide.memory.os.private_maps import address_in, make_private, make_read_only
from lowtide.models.arguments.names import option
from lowtide.models.errors import ModelError
from lowtide.models.gguf.header.reader import TensorInfo, read_gguf
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.kernels.repack import Progress, repackable_tensors, slice_rows
from lowtide.runtime.errors import CannotRepack


def repacked_while_loading(spec: ModelSpec) -> ModelSpec:
    """Return the spec with the names of the matrices that `repack_mapped` will repack.

    Raises `CannotRepack` with the reason where there are none, or mappings cannot be changed on this system.
    """
    if sys.platform != "linux":
        raise CannotRepack(
            f"the repacked copy of {spec.name} is not made, because {spec.no_copy_reason}"
        )
    names = [tensor.name for path in spec.paths for tensor in repackable_tensors(read_gguf(path))]
    if not names:
        raise CannotRepack(
            f"none of the matrices of {spec.name} ({spec.quantisation}) can be repacked"
        )
    return replace(spec, repacked_tensors=tuple(names))


def repack_mapped(
    spec: ModelSpec, maps: Sequence[Collection[FileMap]], progress: Progress = lambda _: None
) -> None:
    """Replace the matrices in the mappings of the model's files, one collection for each file, by their tiles.

    Raises `ModelError` where a matrix is not mapped, or the system refuses a private mapping.
    """
    for path, mapped in zip(spec.paths, maps, strict=True):
        contents = read_gguf(path)
        places = [
            (
                tensor,
                contents.data_start + tensor.offset,
                _address(path, mapped, tensor, contents.data_start),
            )
            for tensor in repackable_tensors(contents)
        ]
        try:
            make_private(path, mapped)
            for tensor, offset, address in places:
                _repack(path, tensor, offset, address, progress)
        except OSError as error:
            raise ModelError(
                f"the weights of {spec.name} could not be repacked in memory ({error.strerror or error}): "
                f"choose {option('reference', True)}"
            ) from error
        make_read_only(mapped)


def _address(path: Path, maps: Collection[FileMap], tensor: TensorInfo, data_start: int) -> int:
    address = address_in(maps, data_start + tensor.offset, tensor.num_bytes)
    if address is None:
        raise ModelError(
            f"{tensor.name} is not mapped from {path}, so it cannot be repacked in memory"
        )
    return address


def _repack(path: Path, tensor: TensorInfo, offset: int, address: int, progress: Progress) -> None:
    num_columns, num_rows = tensor.shape
    row_bytes = tensor.num_bytes // num_rows
    step = slice_rows(row_bytes) * row_bytes
    with path.open("rb") as file:
        file.seek(offset)
        for begin in range(0, tensor.num_bytes, step):
            rows = bytearray(file.read(min(step, tensor.num_bytes - begin)))
            if len(rows) < min(step, tensor.num_bytes - begin):
                raise OSError(f"{path} ended while it was read")
            tiles = bytearray(len(rows))
            repack_rows(tensor.type_name, rows, len(rows) // row_bytes, num_columns, tiles)
            ctypes.memmove(
                address + begin, (ctypes.c_char * len(tiles)).from_buffer(tiles), len(tiles)
            )
            progress(len(tiles))
