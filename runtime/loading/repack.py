"""Packed copies of models in the cache folder: found, checked, made anew where they are not sound.

Packed weights of ONNX graphs in the cache folder: found, checked, made anew where they are not sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowtide.attention.bindings.matmul import (
    is_valid_tile_file,
    repackable,
    write_repacked,
    write_tiles,
)
from lowtide.models.catalog import cache_folder
from lowtide.models.errors import LowtideError
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.gguf.reader import GgufContents, read_gguf
from lowtide.models.gguf.repacked import is_valid
from lowtide.models.gguf.spec import read_spec
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.errors import CannotRepack
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.profiling.profiler import Profiler


def repacked_onnx(spec: OnnxSpec, progress: Callable[[int], None] = lambda _: None) -> OnnxSpec:
    """Return the spec with the file of its packed weights, which is made where there is none that is sound.

    `progress` is told of bytes as they are written. Raises `CannotRepack`, with the reason, where none of its
    products has a packed form, or the file cannot be written; `BadModelFile` for weights that have none.
    """
    form = spec.packed
    if isinstance(form, str):
        raise CannotRepack(f"the weights of {spec.name} cannot be packed: its graph {form}")
    path = cache_folder() / "packed" / f"{file_fingerprint(spec.paths)}.panels"
    if not is_valid_tile_file(path, form):
        try:
            write_tiles(form, spec.path.parent, path, progress)
        except OSError as error:
            raise CannotRepack(
                f"the packed weights of {spec.name} cannot be written to {path.parent} "
                f"({error.strerror or error}): make room, or leave --repack out"
            ) from error
    names = tuple(node.output for node in form.swap.products.products)
    return replace(spec, tiles=path, paths=(*spec.paths, path), repacked_tensors=names)


def repacked_copy(spec: ModelSpec, progress: Callable[[int], None] = lambda _: None) -> ModelSpec:
    """Return the spec of the model's packed copy, which is made where there is none that is sound.

    `progress` is told of bytes as they are written. Raises `CannotRepack`, with the reason, where none of its
    matrices has a packed form, or the copy cannot be written.
    """
    if isinstance(spec, OnnxSpec):
        return repacked_onnx(spec, progress)
    component = file_fingerprint(spec.paths)
    paths = [repacked_path(path, component) for path in spec.paths]
    if not all(_is_there(path, component) for path in paths):
        parts = [read_gguf(path) for path in spec.paths]
        if not any(repackable(part) for part in parts):
            raise CannotRepack(
                f"none of the matrices of {spec.name} ({spec.quantisation}) has a packed form"
            )
        for part, path in zip(parts, paths, strict=True):
            _write(part, path, component, progress)
    # Of the rest the model's own headers say the same, and its fingerprint goes by its data.
    return replace(read_spec(paths[0]), name=spec.name, fingerprint=spec.fingerprint)


def repacked_path(path: Path, component: str) -> Path:
    """Return where the packed copy of one of a model's files lies: parts keep their numbers."""
    stem, _, number = path.stem.partition("-0000")
    suffix = f"-0000{number}" if number and stem else ""
    return cache_folder() / "packed" / f"{component}{suffix}.gguf"


def _is_there(path: Path, component: str) -> bool:
    try:
        return is_valid(read_gguf(path), component)
    except (LowtideError, OSError):
        return False


def _write(part: GgufContents, path: Path, component: str, progress: Callable[[int], None]) -> None:
    try:
        write_repacked(part, path, component, progress)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CannotRepack(
            f"the packed copy of {part.path} cannot be written to {path.parent}: {reason}"
        ) from error


def with_repacked_weights(
    planned: ResolvedModel, profiler: Profiler
) -> tuple[ResolvedModel, str | None]:
    """Have the weights read from the model's packed copy, or say why it has none.

    Raises `CannotRepack` for an ONNX graph, whose plan is another without.
    """
    with profiler.span("packing"):
        try:
            return replace(planned, spec=repacked_copy(planned.spec)), None
        except CannotRepack as reason:
            if isinstance(planned.spec, OnnxSpec):
                raise
            return planned, str(reason)
