"""Packed weights of ONNX graphs in the cache folder: found, checked, made anew where they are not sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowtide.attention.panel_file import is_sound, write_panels
from lowtide.models.catalog import cache_folder
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.errors import NotPacked


def packed_onnx(spec: OnnxSpec, progress: Callable[[int], None] = lambda _: None) -> OnnxSpec:
    """Return the spec with the file of its packed weights, which is made where there is none that is sound.

    `progress` is told of bytes as they are written. Raises `NotPacked`, with the reason, where none of its
    products has a packed form, or the file cannot be written; `BadModelFile` for weights that have none.
    """
    form = spec.packed
    if isinstance(form, str):
        raise NotPacked(f"the weights of {spec.name} cannot be packed: its graph {form}")
    path = cache_folder() / "packed" / f"{file_fingerprint(spec.paths)}.panels"
    if not is_sound(path, form):
        try:
            write_panels(form, spec.path.parent, path, progress)
        except OSError as error:
            raise NotPacked(
                f"the packed weights of {spec.name} cannot be written to {path.parent} "
                f"({error.strerror or error}): make room, or leave --pack out"
            ) from error
    names = tuple(node.output for node in form.swap.products.products)
    return replace(spec, panels=path, paths=(*spec.paths, path), packed_tensors=names)
