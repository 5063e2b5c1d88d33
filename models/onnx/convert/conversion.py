"""A GGUF model -> an ONNX folder: graph, weights, configuration and tokenizer, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.errors import ModelError, UnsupportedModel
from lowtide.models.gguf_reader import read_gguf
from lowtide.models.onnx.convert.config_files import genai_config, model_config
from lowtide.models.onnx.convert.decoder_graph import DecoderGraph
from lowtide.models.onnx.convert.decoder_shape import DecoderShape, decoder_shape
from lowtide.models.onnx.convert.external_data import ExternalData
from lowtide.models.onnx.convert.gguf_weights import GgufWeights
from lowtide.models.onnx.convert.graph_nodes import GraphNodes
from lowtide.models.onnx.convert.header_keys import HeaderKeys
from lowtide.models.onnx.convert.stored_matrices import FLOAT_ROWS, INT8_ROWS, StoredMatrices
from lowtide.models.onnx.convert.tokenizer_json import GgufVocabulary
from lowtide.models.onnx.convert.whole_folder import whole_folder
from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.spec import ENGINE, FINGERPRINT
from lowtide.models.spec import ModelSpec

GRAPH, DATA = "model.onnx", "model.onnx.data"
ROWS = {"int8": INT8_ROWS, "float32": FLOAT_ROWS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written: `rounded` counts the matrices that lost precision, by their type before."""

    folder: Path
    num_bytes: int
    rounded: dict[str, int]


def convert(
    spec: ModelSpec,
    folder: Path,
    *,
    rows: str = "int8",
    replace: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Conversion:
    """Write the GGUF model of `spec` as an ONNX folder, tensor by tensor; `advance` is told of bytes read.

    `rows` is what products take rows of activations as: "int8" (rounded in blocks of 32, as llama.cpp does)
    or "float32". Raises `UnsupportedModel` for a model that no graph is written for, or without the extra;
    `BadOption` where `folder` exists and `replace` is not set; `ModelError` where it cannot be written.
    """
    onnx_library("onnx")
    if spec.engine == ENGINE:
        raise UnsupportedModel(f"{spec.path} is no GGUF model: name a .gguf file to convert")
    keys = HeaderKeys(read_gguf(spec.path))
    shape, vocabulary = decoder_shape(spec, keys), GgufVocabulary(keys)
    try:
        with whole_folder(folder, replace=replace) as new:
            rounded = _write_model(new, spec, shape, ROWS[rows], advance)
            _write_json(new / "genai_config.json", genai_config(shape, vocabulary))
            _write_json(new / "config.json", model_config(shape, vocabulary))
            _write_json(new / "tokenizer.json", vocabulary.tokenizer_json())
            texts = vocabulary.tokenizer_config(shape.architecture, shape.context_length)
            _write_json(new / "tokenizer_config.json", texts)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written ({error.strerror or error}): make room, or name another place"
        ) from None
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Conversion(folder=folder, num_bytes=num_bytes, rounded=rounded)


def _write_model(
    folder: Path,
    spec: ModelSpec,
    shape: DecoderShape,
    accuracy_level: int,
    advance: Callable[[int], None],
) -> dict[str, int]:
    weights, nodes = GgufWeights(spec), GraphNodes()
    try:
        with (folder / DATA).open("wb") as file:
            data = ExternalData(file, DATA)
            matrices = StoredMatrices(
                nodes, data, weights, accuracy_level=accuracy_level, advance=advance
            )
            DecoderGraph(shape, weights, nodes, matrices).build()
        weights.require_all_read()
    finally:
        weights.close()
    (folder / GRAPH).write_bytes(nodes.model(shape.name, {FINGERPRINT: spec.fingerprint}))
    return dict(matrices.rounded)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
