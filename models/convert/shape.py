"""DecoderShape: what the ONNX graph of a decoder depends on, from its GGUF header; reads no weights."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.errors import BadModelFile, UnsupportedModel
from lowtide.models.gguf.header.reader import GgufContents
from lowtide.models.spec import ModelSpec

_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The format characters of `struct` by GGUF's number of a scalar type."""
_STRING, _ARRAY = 8, 9


class HeaderKeys:
    """All keys of one file, long arrays included, which `read_gguf` only measures.

    The file must have been read by `read_gguf`, which checks it. Lookups are typed and errors name the key.
    """

    def __init__(self, contents: GgufContents) -> None:
        self.path: Path = contents.path
        with contents.path.open("rb") as file:
            self._data = file.read(contents.metadata_end)
        self._position = 24
        self._values = {
            self._text(): self._value(self._number("I")) for _ in range(contents.num_keys)
        }
        self.architecture = str(self._values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; arrays are lists."""
        return self._values.get(key, default)

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """Return the value of "<architecture>.KEY"."""
        return self.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the architecture; raise `BadModelFile` where it is missing or not a number."""
        value = self.of_architecture(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadModelFile(
                f"{self.path}: the header's {self.architecture}.{key} is {value!r}; it must be a number"
            )
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list of `kind`, empty where there is none; raise `BadModelFile` for anything else."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise BadModelFile(
                f"{self.path}: the header's {key} is not a list of {kind.__name__}: fetch the file again"
            )
        return value

    def _number(self, letter: str) -> Any:
        layout = struct.Struct("<" + letter)
        (value,) = layout.unpack_from(self._data, self._position)
        self._position += layout.size
        return value

    def _text(self) -> str:
        length = self._number("Q")
        start = self._position
        self._position = start + length
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_FORMATS[kind])
        item_kind, length = self._number("I"), self._number("Q")
        if item_kind == _STRING:
            return [self._text() for _ in range(length)]
        layout = struct.Struct(f"<{length}{_FORMATS[item_kind]}")
        values = list(layout.unpack_from(self._data, self._position))
        self._position += layout.size
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What all models of one architecture have in common.

    `has_paired_rows`: llama.cpp's converter reordered the rows of queries and keys (`dequantize.unpaired`).
    `model_type` and `tokenizer_class` are the names in config.json and tokenizer_config.json.
    """

    model_type: str
    tokenizer_class: str
    has_paired_rows: bool = False
    is_gemma: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama", tokenizer_class="PreTrainedTokenizerFast", has_paired_rows=True
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", tokenizer_class="GemmaTokenizer", is_gemma=True
    ),
    "qwen2": Architecture(model_type="qwen2", tokenizer_class="Qwen2Tokenizer"),
    "qwen3": Architecture(model_type="qwen3", tokenizer_class="Qwen2Tokenizer"),
}
GEMMA_PATTERN = 6
"""Every sixth layer of Gemma 3 attends to the whole context, the others to a window (Gemma 3 report, section 2)."""
GEMMA_LOCAL_BASE = 10_000.0
GEMMA_27B_LAYERS = 62
"""The one size that scales scores by embedding width / heads instead of by head_dim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary angles: position * `base` ** (-2 i / head_dim) / `divisor`."""

    base: float
    divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The shape of a decoder; `window` and `context_length` count tokens, other sizes elements."""

    name: str
    architecture: Architecture
    num_layers: int
    width: int
    feed_forward_width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary: int
    context_length: int
    window: int | None
    norm_epsilon: float
    score_scale: float
    rotary: Rotary
    local_rotary: Rotary | None

    def is_local(self, layer: int) -> bool:
        """Whether the layer attends to the window only."""
        return self.window is not None and (layer + 1) % GEMMA_PATTERN != 0


def decoder_shape(spec: ModelSpec, keys: HeaderKeys) -> DecoderShape:
    """Return the shape; raise `UnsupportedModel` for a decoder that cannot be converted."""
    architecture = ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        raise _unsupported(
            spec,
            f"the architecture is {spec.architecture!r}; only {', '.join(ARCHITECTURES)} can be converted",
        )
    head_size = spec.key_head_dim
    if len(set(spec.num_kv_heads)) != 1 or len(set(spec.feed_forward_width)) != 1:
        raise _unsupported(spec, "its layers differ in heads or widths")
    if spec.value_head_dim != head_size or spec.num_heads % spec.num_kv_heads[0]:
        raise _unsupported(
            spec, "keys and values differ in size, or query heads do not share them evenly"
        )
    if keys.number("rope.dimension_count", head_size) != head_size:
        raise _unsupported(spec, "its rotary embedding covers only a part of each head")
    is_gemma = architecture.is_gemma
    window = spec.sliding_window if is_gemma else None
    if spec.sliding_window and not is_gemma:
        raise _unsupported(spec, "it has sliding windows, which only gemma3 may have")
    whole_width = is_gemma and spec.num_layers == GEMMA_27B_LAYERS
    scaled_size = spec.embedding_width / spec.num_heads if whole_width else head_size
    return DecoderShape(
        name=spec.name,
        architecture=architecture,
        num_layers=spec.num_layers,
        width=spec.embedding_width,
        feed_forward_width=spec.feed_forward_width[0],
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads[0],
        head_size=head_size,
        vocabulary=spec.vocabulary.num_tokens,
        context_length=spec.context_length,
        window=window,
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        score_scale=1 / math.sqrt(scaled_size),
        rotary=Rotary(base=keys.number("rope.freq_base", 10_000.0), divisor=_divisor(spec, keys)),
        local_rotary=Rotary(base=GEMMA_LOCAL_BASE) if is_gemma else None,
    )


def _divisor(spec: ModelSpec, keys: HeaderKeys) -> float:
    """Return the divisor of positions; raise `UnsupportedModel` for another kind of scaling."""
    kind = keys.of_architecture("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise _unsupported(
            spec,
            f"its rotary positions are scaled by {kind!r}; only linear or none can be converted",
        )
    legacy_factor = keys.number("rope.scale_linear", 1.0)
    return keys.number("rope.scaling.factor", legacy_factor) if kind == "linear" else legacy_factor


def _unsupported(spec: ModelSpec, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{spec.path} cannot be converted: {reason}; run the GGUF file itself")
