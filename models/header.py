"""The headers of a model of any kind: GGUF, or ONNX by its folder."""

from __future__ import annotations

from pathlib import Path

from lowtide.models.spec import ModelSpec

ONNX_SUFFIX = ".onnx"


def read_spec(path: Path) -> ModelSpec:
    """Read the spec of the model at `path`: a GGUF file, or an ONNX folder or file.

    Raises `ModelError` with what is wrong and what to change.
    """
    if path.is_dir() or path.suffix == ONNX_SUFFIX:
        from lowtide.models.onnx.header import read_spec as read_onnx

        return read_onnx(path)
    from lowtide.models.gguf_header import read_spec as read_gguf

    return read_gguf(path)
