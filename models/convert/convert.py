"""A GGUF model -> an ONNX folder: graph, weights, configuration and tokenizer, whole or not at all.

genai_config.json and config.json: what onnxruntime-genai and others are told of a converted model.

WholeFolder: a folder that appears whole under its name, or not at all. Knows no format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.convert.dequantize import GgufWeights
from lowtide.models.convert.graph import DecoderGraph
from lowtide.models.convert.onnx_writer import (
    FLOAT_ROWS,
    INT8_ROWS,
    ExternalData,
    GraphNodes,
    StoredMatrices,
)
from lowtide.models.convert.shape import DecoderShape, HeaderKeys, decoder_shape
from lowtide.models.convert.tokenizer import GgufVocabulary
from lowtide.models.errors import BadOption, ModelError, UnsupportedModel
from lowtide.models.gguf.reader import read_gguf
from lowtide.models.onnx.config import onnx_library
from lowtide.models.onnx.spec import ENGINE, FINGERPRINT
from lowtide.models.spec import ModelSpec


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
    """Return the content of config.json, in the names that published models have."""
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


CHECKSUMS = "SHA256SUMS"
_READ_BYTES = 1 << 20


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a new folder beside `path`; it takes `path`'s place, with checksums, when the block ends well.

    However the block ends otherwise, what was at `path` stays. `replace` has an older such folder give
    way; without it, one that is there is a `BadOption`, as is any other folder that is not empty. Raises
    `OSError` with the system's reason.
    """
    path = path.absolute()
    if not replace and (path.exists() or path.is_symlink()):
        raise BadOption(f"{path} exists, a new folder is wanted: name another one, or add --force")
    if path.exists() and not _may_give_way(path):
        raise BadOption(
            f"{path} is nothing that was converted here, and would be deleted: name another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _write_checksums(temporary)
        temporary.chmod(0o755)
        _put(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _may_give_way(path: Path) -> bool:
    return path.is_dir() and ((path / CHECKSUMS).is_file() or not any(path.iterdir()))


def _put(new: Path, path: Path) -> None:
    """Rename the new folder to `path`; an older one steps aside first, and is deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_checksums(folder: Path) -> None:
    """Write a line for each file, as `sha256sum -c` reads them, with everything on the disk before."""
    lines = []
    for file in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb") as data:
            while piece := data.read(_READ_BYTES):
                digest.update(piece)
            os.fsync(data.fileno())
        lines.append(f"{digest.hexdigest()}  {file.name}\n")
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as written:
        written.write("".join(lines))
        written.flush()
        os.fsync(written.fileno())


GRAPH, DATA = "model.onnx", "model.onnx.data"
ROWS = {"int8": INT8_ROWS, "float32": FLOAT_ROWS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written: `use_bf16` counts the matrices that lost precision, by their type before."""

    folder: Path
    num_bytes: int
    use_bf16: dict[str, int]


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
            use_bf16 = _write_model(new, spec, shape, ROWS[rows], advance)
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
    return Conversion(folder=folder, num_bytes=num_bytes, use_bf16=use_bf16)


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
    return dict(matrices.use_bf16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
