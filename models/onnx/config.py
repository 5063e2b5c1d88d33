"""OnnxConfig: the shape of an ONNX decoder, from the JSON files in its folder; and how to run one.

onnxruntime-genai writes genai_config.json; Optimum copies config.json from the original model. `OnnxOptions`
says what to allocate, `provider_name` which execution provider a short name means, and `onnx_library` imports
the libraries of the `onnx` extra when they are needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadModelFile, BadOption, ModelNotFound, UnsupportedModel

ENGINE = "onnxruntime"
GENAI = "genai_config.json"
OPTIMUM = "config.json"
MAX_JSON_BYTES = 8 << 20
MAX_LAYERS = 4096
MAX_REASONABLE = 1 << 24
GRAPHS = ("model.onnx", "decoder_model.onnx", "onnx/model.onnx")
"""Where the graph of a folder without genai_config.json may be."""


SLIDING_TYPE = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxConfig:
    """The shape of a decoder; `end_ids` are the tokens that end an answer.

    `past_names` and `present_names` are patterns for keys and for values, with %d for the layer.
    """

    path: Path
    graph: Path
    architecture: str
    num_layers: int
    embedding_width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    sliding_window: int | None
    sliding_layers: tuple[int, ...] | None
    vocabulary: int
    end_ids: tuple[int, ...]
    past_names: tuple[str, str]
    present_names: tuple[str, str]
    input_names: dict[str, str]


def read_config(path: Path) -> OnnxConfig:
    """Read the configuration of the model at `path`, a folder or an .onnx file.

    Raises `ModelNotFound` where there is no model, `BadModelFile` where a value is missing or impossible.
    """
    graph = None if path.is_dir() else path
    folders = (path,) if graph is None else (path.parent, path.parent.parent)
    for folder in folders:
        if (folder / GENAI).is_file():
            return _genai(folder / GENAI, graph)
        if (folder / OPTIMUM).is_file():
            return _optimum(folder / OPTIMUM, graph)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist: name an .onnx file or its folder")
    raise BadModelFile(
        f"{folders[0]} is a folder with neither {GENAI} nor {OPTIMUM}: name a .gguf file, or the folder "
        "of an ONNX decoder written by onnxruntime-genai or Optimum"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; raise `BadModelFile` where it is not one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BadModelFile(
                f"{path} has more than {MAX_JSON_BYTES} bytes, so it is not a configuration: fetch it again"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModelFile(f"{path} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise BadModelFile(f"{path} does not hold a JSON object: fetch it again")
    return value


class _Values:
    """Typed lookups with errors that name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def inner(self, key: str) -> _Values:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "is missing")
        return _Values(self.path, value)

    def number(self, key: str, default: int | None = None, most: int = MAX_REASONABLE) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.wrong(key, "is missing")
        if not isinstance(value, int) or not 1 <= value <= most:
            raise self.wrong(key, f"is {shown(value)}; it must be a number from 1 to {most}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {shown(value)}; it must be a string")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) for item in items):
            raise self.wrong(key, f"is {shown(value)}; it must be token ids")
        return tuple(items)

    def wrong(self, key: str, reason: str) -> BadModelFile:
        return BadModelFile(f"{self.path}: {key} {reason}; export the model again")


def _genai(path: Path, graph: Path | None) -> OnnxConfig:
    model = _Values(path, read_json(path)).inner("model")
    decoder = model.inner("decoder")
    inputs = {
        key: name
        for key, name in decoder.inner("inputs").values.items()
        if isinstance(name, str) and not key.startswith("past_")
    }
    names, outputs = decoder.inner("inputs"), decoder.inner("outputs")
    window = decoder.values.get("sliding_window")
    width, heads = decoder.number("hidden_size"), decoder.number("num_attention_heads")
    return OnnxConfig(
        path=path,
        graph=graph or path.parent / decoder.text("filename", "model.onnx"),
        architecture=model.text("type", "decoder"),
        num_layers=decoder.number("num_hidden_layers", most=MAX_LAYERS),
        embedding_width=width,
        num_heads=heads,
        num_kv_heads=decoder.number("num_key_value_heads", default=heads),
        head_size=decoder.number("head_size", default=max(width // heads, 1)),
        context_length=model.number("context_length"),
        sliding_window=window.get("window_size") if isinstance(window, dict) else None,
        sliding_layers=_layer_numbers(window.get("layers") if isinstance(window, dict) else None),
        vocabulary=model.number("vocab_size"),
        end_ids=model.numbers("eos_token_id"),
        past_names=(
            names.text("past_key_names", "past_key_values.%d.key"),
            names.text("past_value_names", "past_key_values.%d.value"),
        ),
        present_names=(
            outputs.text("present_key_names", "present.%d.key"),
            outputs.text("present_value_names", "present.%d.value"),
        ),
        input_names={**inputs, "logits": outputs.text("logits", "logits")},
    )


def _optimum(path: Path, graph: Path | None) -> OnnxConfig:
    values = _Values(path, read_json(path))
    folder = path.parent
    graph = graph or next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    if graph is None:
        raise BadModelFile(f"{folder} has none of {', '.join(GRAPHS)}: name the .onnx file itself")
    width, heads = values.number("hidden_size"), values.number("num_attention_heads")
    generation_path = folder / "generation_config.json"
    generation = _Values(
        generation_path, read_json(generation_path) if generation_path.is_file() else {}
    )
    return OnnxConfig(
        path=path,
        graph=graph,
        architecture=values.text("model_type", "decoder"),
        num_layers=values.number("num_hidden_layers", most=MAX_LAYERS),
        embedding_width=width,
        num_heads=heads,
        num_kv_heads=values.number("num_key_value_heads", default=heads),
        head_size=values.number("head_dim", default=max(width // heads, 1)),
        context_length=values.number("max_position_embeddings"),
        sliding_window=values.values.get("sliding_window"),
        sliding_layers=_sliding_types(values.values.get("layer_types")),
        vocabulary=values.number("vocab_size"),
        end_ids=(*values.numbers("eos_token_id"), *generation.numbers("eos_token_id")),
        past_names=("past_key_values.%d.key", "past_key_values.%d.value"),
        present_names=("present.%d.key", "present.%d.value"),
        input_names={},
    )


def _layer_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        return None
    return tuple(value)


def _sliding_types(value: object) -> tuple[int, ...] | None:
    """Return the layers with a sliding window from the types of all layers, as transformers names them."""
    if not isinstance(value, list):
        return None
    return tuple(layer for layer, kind in enumerate(value) if kind == SLIDING_TYPE)


EXTRA = "pip install 'lowtide[onnx]'"


def onnx_library(name: str) -> Any:
    """Import and return the module `name`; raise `UnsupportedModel` with what to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedModel(
            f"ONNX models need {name.partition('.')[0]}, which cannot be imported ({error}): {EXTRA}"
        ) from None


CPU = "cpu"
_SUFFIX = "ExecutionProvider"
NOT_ON_THIS_MACHINE = frozenset({"azure"})
"""Providers that run models on other machines."""


def provider_name(provider: str) -> str:
    """Return onnxruntime's full name of a provider ("cuda" is CUDAExecutionProvider).

    Raises `BadOption` with the installed ones where it is not installed.
    """
    library = onnx_library("onnxruntime")
    installed = {
        name.removesuffix(_SUFFIX).lower(): name
        for name in library.get_available_providers()
        if name.removesuffix(_SUFFIX).lower() not in NOT_ON_THIS_MACHINE
    }
    if provider.lower() not in installed:
        raise BadOption(
            f"{option('provider')} is {provider!r}, but onnxruntime {library.__version__} here has only "
            f"{', '.join(sorted(installed))}: choose one of these, or install a build of onnxruntime with it"
        )
    return str(installed[provider.lower()])


def session_providers(provider: str) -> list[str]:
    """Return the full names for a session: the provider, and the CPU for what it cannot run."""
    name, cpu = provider_name(provider), provider_name(CPU)
    return [name] if name == cpu else [name, cpu]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """What to allocate for an ONNX model and where to run it.

    `context` and `batch_size` count tokens. `kv_type` is the KV type of a rewritten graph; any other graph has
    its own. `provider` is the short name of an execution provider. `verify_batch` is how many tokens of a pass
    may have logits. In the `background`, passes compute where nobody else wants the cores. `stage` is entered
    around "weights" and "context" as they are made.
    """

    context: int
    batch_size: int
    threads: int
    kv_type: str = "f32"
    provider: str = CPU
    verify_batch: int = 1
    background: bool = False
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext


SPIN_US = "50"
"""Microseconds that a thread spins for more work, as lowtide's own (`attention/native/sleep.h`); older versions of
onnxruntime do not read it."""


def session_options(threads: int) -> Any:
    """Return onnxruntime's session options; its threads sleep between passes.

    Activations lie in its arena, which keeps their memory: on the C library's heap they sometimes leave holes
    of tens of MiB.
    """
    options = onnx_library("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    return options
