"""Repacked weights in the cache folder: found, checked, and made where there is no valid copy.

A GGUF model gets a copy of its files with matrices in tiles (`models/gguf/header/repacked.py`), an ONNX model one
file with the tiles of all its matrices. Both are written with the kernels' own repacking, a slice at a time,
and appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lowtide.attention.bindings.matmul import can_repack, repack_rows
from lowtide.models.arguments.names import option
from lowtide.models.errors import LowtideError
from lowtide.models.facts.store import Facts
from lowtide.models.files.atomic_file import atomic_file
from lowtide.models.files.fingerprint import samples_digest
from lowtide.models.files.folders import CACHE_VARIABLE
from lowtide.models.gguf.header.reader import GgufContents, TensorInfo, read_gguf
from lowtide.models.gguf.header.repacked import (
    LAYOUT,
    data_digest,
    is_valid,
    matmul_tensors,
    repacked_header,
)
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import TILE_ALIGNMENT, TILE_ROWS, ModelSpec
from lowtide.runtime.backends.kernels.copies import (
    collect_copies,
    copies_folder,
    fingerprint_of,
    locked,
    no_room,
    read_copies,
    remember_model,
)
from lowtide.runtime.errors import CannotRepack

if TYPE_CHECKING:
    from lowtide.models.onnx.rewrite.plan import RepackPlan
    from lowtide.models.onnx.spec import OnnxSpec

SLICE_BYTES = 1 << 20
"""How much is read, repacked and written at once."""
TILE_FILE_MAGIC = b"lowtide tiles 1\n"
"""The first line of a file of tiles, with the version of its layout."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just written."""


def repacked_gguf(spec: ModelSpec, progress: Progress = lambda _: None) -> ModelSpec:
    """Return the spec of the model's repacked copy; make the copy where there is no valid one.

    Raises `CannotRepack` with the reason where no matrix can be repacked, or the copy cannot be written.
    """
    fingerprint = fingerprint_of(spec.paths)
    targets = [repacked_path(path, fingerprint) for path in spec.paths]
    if not _are_valid(targets, fingerprint):
        sources = [read_gguf(path) for path in spec.paths]
        if not any(repackable_tensors(source) for source in sources):
            raise CannotRepack(
                f"none of the matrices of {spec.name} ({spec.quantisation}) can be repacked"
            )
        _make_room(spec, sum(source.file_bytes for source in sources))
        for source, target in zip(sources, targets, strict=True):
            write = partial(write_repacked_gguf, source, target, fingerprint, progress)
            _write(write, f"the repacked copy of {source.path}", target)
    remember_model(fingerprint, spec.paths)
    # The headers of the copy say nothing else about the model, whose fingerprint depends on its data.
    return replace(
        read_spec(targets[0]),
        name=spec.name,
        fingerprint=spec.fingerprint,
        chat_template=spec.chat_template,
    )


def repacked_onnx(spec: OnnxSpec, progress: Progress = lambda _: None) -> OnnxSpec:
    """Return the spec with the file of its repacked weights; make the file where there is no valid one.

    Raises `CannotRepack` with the reason where no matmul can be repacked or the file cannot be written,
    `BadModelFile` for weights that cannot be converted.
    """
    plan = spec.repack
    if isinstance(plan, str):
        raise CannotRepack(f"the weights of {spec.name} cannot be repacked: its graph {plan}")
    fingerprint = fingerprint_of(spec.paths)
    target = _folder() / f"{fingerprint}.tiles"
    if not is_valid_tile_file(target, plan):
        _make_room(spec, plan.offsets[-1])
        write = partial(write_tile_file, plan, spec.path.parent, target, progress)
        _write(write, f"the repacked weights of {spec.name}", target)
    remember_model(fingerprint, spec.paths)
    names = tuple(node.output for node in plan.rewrite.matmuls.matmuls)
    return replace(spec, tiles=target, paths=(*spec.paths, target), repacked_tensors=names)


def _make_room(spec: ModelSpec, num_bytes: int) -> None:
    """Delete copies that nobody needs; raise `CannotRepack` where the disk has no room for one of so many bytes."""
    _folder()
    collect_copies()
    reason = no_room(num_bytes)
    if reason is not None:
        raise CannotRepack(
            f"the repacked copy of {spec.name} is not made, because {reason}, or choose {option('reference', True)}"
        )


def _write(write: Callable[[], None], what: str, target: Path) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        if isinstance(error, LowtideError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CannotRepack(
            f"{what} cannot be written to {target.parent} ({reason}): make room, set {CACHE_VARIABLE} to "
            f"another folder, or choose {option('reference', True)}"
        ) from error


def cannot_store(spec: ModelSpec) -> str | None:
    """Return why no repacked copy can be stored, and what to set; None where it can be, or is there already."""
    fingerprint = fingerprint_of(spec.paths)
    if any(copy.fingerprint == fingerprint for copy in read_copies()):
        return None
    reason = no_room(spec.file_bytes)
    return reason and f"the repacked weights of {spec.name} have no place: {reason}"


def _folder() -> Path:
    """Return the folder of repacked copies; raises `CannotRepack` for a user without a cache folder."""
    folder = copies_folder()
    if folder is None:
        raise CannotRepack(
            f"repacked weights have no place, because this user has no home folder: set {CACHE_VARIABLE}, or "
            f"choose {option('reference', True)}"
        )
    return folder


def repacked_path(path: Path, fingerprint: str) -> Path:
    """Return where the repacked copy of one of a model's files lies; parts of a split model keep their number."""
    stem, _, number = path.stem.partition("-0000")
    suffix = f"-0000{number}" if number and stem else ""
    return _folder() / f"{fingerprint}{suffix}.gguf"


def _are_valid(targets: Sequence[Path], fingerprint: str) -> bool:
    """Whether the copy is there and whole; that it is, is stored until one of its files changes."""
    facts = Facts.about("copy", *targets, f"{fingerprint} {LAYOUT}")
    if facts.read() is True:
        return True
    if not all(_is_valid_copy(path, fingerprint) for path in targets):
        return False
    facts.write(True, targets)
    return True


def _is_valid_copy(path: Path, fingerprint: str) -> bool:
    try:
        return is_valid(read_gguf(path), fingerprint)
    except (LowtideError, OSError):
        return False


def repackable_tensors(contents: GgufContents) -> list[TensorInfo]:
    """Return the tensors of a GGUF file that can be repacked."""
    return [
        tensor
        for tensor in matmul_tensors(contents.tensors)
        if can_repack(tensor.type_name, tensor.shape[1], tensor.shape[0])
    ]


def write_repacked_gguf(
    source: GgufContents, target: Path, fingerprint: str, progress: Progress
) -> None:
    """Write `source` with repacked matrices to `target`; `fingerprint` is that of the model's files.

    Raises `OSError` where the system cannot write it and `ValueError` where its header does not suit the
    kernels; nothing is left behind then.
    """
    tensors = repackable_tensors(source)
    header = repacked_header(source, tensors, fingerprint)
    names = {tensor.name for tensor in tensors}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as out, source.path.open("rb") as file:
        locked(out, wait=True)
        out.write(header.start)
        for old, new in zip(source.tensors, header.tensors, strict=True):
            out.write(b"\0" * (len(header.start) + new.offset - out.tell()))
            file.seek(source.data_start + old.offset)
            _copy_tensor(file, out, old, progress, repack=old.name in names)
        out.flush()
        digest = data_digest(Path(out.name), len(header.start))
        out.seek(header.digest_offset)
        out.write(digest.encode())


def _copy_tensor(
    file: BinaryIO, out: BinaryIO, tensor: TensorInfo, progress: Progress, *, repack: bool
) -> None:
    num_columns, num_rows = (*tensor.shape, 1)[:2]
    row_bytes = tensor.num_bytes // num_rows if repack else 1
    step = slice_rows(row_bytes) * row_bytes
    for begin in range(0, tensor.num_bytes, step):
        rows = bytearray(file.read(min(step, tensor.num_bytes - begin)))
        if len(rows) < min(step, tensor.num_bytes - begin):
            raise OSError(f"{file.name} ended while it was read")
        if repack:
            _write_tiles(out, tensor.type_name, rows, len(rows) // row_bytes, num_columns, progress)
        else:
            out.write(rows)
            progress(len(rows))


def write_tile_file(plan: RepackPlan, folder: Path, target: Path, progress: Progress) -> None:
    """Write the matrices of `plan`, with weights in `folder`, to `target`.

    The file begins with `TILE_ALIGNMENT` bytes: a line that identifies it, and a digest of the data behind.
    Raises `OSError` where the system cannot read or write, `BadModelFile` for weights that cannot be
    converted; nothing is left behind then.
    """
    *starts, end = plan.offsets
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as out:
        locked(out, wait=True)
        for matrix, start in zip(plan.rewrite.matmuls.matrices, starts, strict=True):
            out.seek(start)
            for rows in matrix.ggml_rows(folder, slice_rows(matrix.num_bytes // matrix.num_rows)):
                blocks = bytearray(rows.tobytes())
                _write_tiles(out, matrix.type_name, blocks, len(rows), matrix.num_columns, progress)
        out.truncate(end)
        out.flush()
        digest = samples_digest([(Path(out.name), TILE_ALIGNMENT)])
        out.seek(0)
        out.write(_tile_file_header(digest))


def is_valid_tile_file(path: Path, plan: RepackPlan) -> bool:
    """Whether the file at `path` is complete and has the matrices of `plan`; False where there is none."""
    try:
        with path.open("rb") as file:
            header = file.read(TILE_ALIGNMENT)
        return path.stat().st_size == plan.offsets[-1] and header == _tile_file_header(
            samples_digest([(path, TILE_ALIGNMENT)])
        )
    except OSError:
        return False


def _tile_file_header(digest: str) -> bytes:
    return (TILE_FILE_MAGIC + digest.encode()).ljust(TILE_ALIGNMENT, b"\n")


def slice_rows(row_bytes: int) -> int:
    """Return how many rows of so many bytes make a slice: whole tiles."""
    return max(SLICE_BYTES // row_bytes // TILE_ROWS, 1) * TILE_ROWS


def _write_tiles(
    out: BinaryIO,
    type_name: str,
    rows: bytearray,
    num_rows: int,
    num_columns: int,
    progress: Progress,
) -> None:
    tiles = bytearray(len(rows))
    repack_rows(type_name, rows, num_rows, num_columns, tiles)
    out.write(tiles)
    progress(len(tiles))
