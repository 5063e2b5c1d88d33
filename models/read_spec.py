"""Reads the headers of a model of any kind: GGUF, or ONNX by its folder."""

from __future__ import annotations

import os
from pathlib import Path

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadModelFile, ModelNotFound
from lowtide.models.gguf.header.spec import read_spec as read_gguf_spec
from lowtide.models.spec import ModelSpec

ONNX_SUFFIX = ".onnx"


def read_spec(path: Path) -> ModelSpec:
    """Read the spec of the model at `path`: a GGUF file, or an ONNX folder or file.

    Raises `ModelError` with what is wrong and what to change.
    """
    try:
        if path.suffix == ONNX_SUFFIX or os.path.isdir(path):
            from lowtide.models.onnx.read_spec import read_spec as read_onnx_spec

            return read_onnx_spec(path)
        return require_original(read_gguf_spec(path))
    except OSError as error:  # such as a folder that this user may not enter
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from None


def require_original(spec: ModelSpec) -> ModelSpec:
    """Return the spec; raise `BadModelFile` for a repacked copy, which llama.cpp would misread."""
    if spec.repacked_tensors:
        raise BadModelFile(
            f"{spec.path} is a repacked copy, which {option('repack')} finds by itself: name the original model "
            f"and add {option('repack', True)}"
        )
    return spec
