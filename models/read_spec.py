"""The headers of a model of any kind: GGUF, or ONNX by its folder."""

from __future__ import annotations

from pathlib import Path

from lowtide.models.errors import BadModelFile
from lowtide.models.spec import ModelSpec

ONNX_SUFFIX = ".onnx"


def read_spec(path: Path) -> ModelSpec:
    """Read the spec of the model at `path`: a GGUF file, or an ONNX folder or file.

    Raises `ModelError` with what is wrong and what to change.
    """
    if path.is_dir() or path.suffix == ONNX_SUFFIX:
        from lowtide.models.onnx.read_spec import read_spec as read_onnx

        return read_onnx(path)
    from lowtide.models.gguf.spec import read_spec as read_gguf

    return of_a_model(read_gguf(path))


def of_a_model(spec: ModelSpec) -> ModelSpec:
    """Return the spec; raises `BadModelFile` where it is a packed copy, which llama.cpp would misread."""
    if spec.repacked_tensors:
        raise BadModelFile(
            f"{spec.path} is a packed copy, which --repack finds by itself: name the model that it was made "
            "from, and --repack"
        )
    return spec
