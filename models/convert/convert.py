"""Converts a GGUF model to an ONNX folder: graph, weights, configuration and tokenizer.

The folder appears complete, with checksums, or not at all. genai_config.json is for onnxruntime-genai,
config.json for other tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.convert.dequantize import GgufWeights
from lowtide.models.convert.graph import DecoderGraph
from lowtide.models.convert.onnx_writer import (
    FLOAT_ACTIVATIONS,
    INT8_ACTIVATIONS,
    ExternalData,
    GraphNodes,
    MatrixWriter,
)
from lowtide.models.convert.shape import DecoderShape, HeaderKeys, decoder_shape
from lowtide.models.convert.tokenizer import GgufVocabulary
from lowtide.models.errors import ModelError, UnsupportedModel
from lowtide.models.files.atomic_file import atomic_folder
from lowtide.models.gguf.header.reader import read_gguf
from lowtide.models.onnx.config import ENGINE, onnx_library
from lowtide.models.onnx.spec import FINGERPRINT
from lowtide.models.spec import ModelSpec

GRAPH, DATA = "model.onnx", "model.onnx.data"
ACCURACY_LEVELS = {"int8": INT8_ACTIVATIONS, "float32": FLOAT_ACTIVATIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written; `rounded` counts the floating-point matrices that were rounded to 8 bits, by type."""

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
    """Write the GGUF model of `spec` as an ONNX folder, tensor by tensor; `advance` is called with bytes read.

    `rows` is the precision of activations in matmuls: "int8" (rounded in blocks of 32, as llama.cpp does) or
    "float32". Raises `UnsupportedModel` for an architecture that cannot be converted, or without the `onnx`
    extra; `BadOption` where `folder` exists and `replace` is not set; `ModelError` where it cannot be written.
    """
    onnx_library("onnx")
    if spec.engine == ENGINE:
        raise UnsupportedModel(f"{spec.path} is not a GGUF model: name a .gguf file to convert")
    keys = HeaderKeys(read_gguf(spec.path))
    shape, vocabulary = decoder_shape(spec, keys), GgufVocabulary(keys)
    try:
        with atomic_folder(folder, replace=replace) as new:
            rounded = _write_model(new, spec, shape, ACCURACY_LEVELS[rows], advance)
            _write_json(new / "genai_config.json", genai_config(shape, vocabulary))
            _write_json(new / "config.json", model_config(shape, vocabulary))
            _write_json(new / "tokenizer.json", vocabulary.tokenizer_json())
            texts = vocabulary.tokenizer_config(shape.architecture, shape.context_length)
            _write_json(new / "tokenizer_config.json", texts)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written ({error.strerror or error}): make room, or name another folder"
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
            matrices = MatrixWriter(
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


def genai_config(shape: DecoderShape, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of genai_config.json (onnxruntime-genai, "Config reference")."""
    ends = vocabulary.end_ids
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    padding = vocabulary.special("padding")
    first = vocabulary.special("bos")
    return {
        "model": {
            "type": shape.architecture.model_type,
            "bos_token_id": ends[0] if first is None else first,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if padding is None else padding,
            "context_length": shape.context_length,
            "vocab_size": shape.vocabulary,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": shape.context_length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def model_config(shape: DecoderShape, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of config.json, with the keys of published models."""
    local = shape.local_rotary
    return {
        "model_type": shape.architecture.model_type,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context_length,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary.base,
        **({"rope_local_base_freq": local.base} if local else {}),
        **({"sliding_window": shape.window} if shape.window else {}),
        "bos_token_id": vocabulary.special("bos"),
        "eos_token_id": vocabulary.end_ids,
    }
