"""DecoderShape: what a graph must know of a decoder, from its GGUF header. Reads no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowtide.models.errors import UnsupportedModel
from lowtide.models.onnx.convert.header_keys import HeaderKeys
from lowtide.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What all models of one architecture have in common.

    `pairs_rows`: llama.cpp's converter has moved the rows of queries and keys so that rotary turns
    neighbours; they go back to halves, as the models were published. `model_type` and `tokenizer_class` are
    what config.json and tokenizer_config.json call it.
    """

    model_type: str
    tokenizer_class: str
    pairs_rows: bool = False
    is_gemma: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama", tokenizer_class="PreTrainedTokenizerFast", pairs_rows=True
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", tokenizer_class="GemmaTokenizer", is_gemma=True
    ),
    "qwen2": Architecture(model_type="qwen2", tokenizer_class="Qwen2Tokenizer"),
    "qwen3": Architecture(model_type="qwen3", tokenizer_class="Qwen2Tokenizer"),
}
GEMMA_PATTERN = 6
"""Every sixth layer of Gemma 3 sees everything, the others the window (Gemma 3 report, section 2)."""
GEMMA_LOCAL_BASE = 10_000.0
GEMMA_27B_LAYERS = 62
"""The one size that scales scores by its width a head, not by its heads' size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Angles: `base` ** (-2 i / head size) / `divisor` of each position."""

    base: float
    divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes count elements, `window` and `context_length` tokens."""

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
        """Whether the layer sees the window alone."""
        return self.window is not None and (layer + 1) % GEMMA_PATTERN != 0


def decoder_shape(spec: ModelSpec, keys: HeaderKeys) -> DecoderShape:
    """Return the shape; raises `UnsupportedModel` for what no graph is written for."""
    architecture = ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        raise _unsupported(
            spec, f"the architecture is {spec.architecture!r}, one of {', '.join(ARCHITECTURES)}"
        )
    head_size = spec.key_head_size
    if len(set(spec.num_kv_heads)) != 1 or len(set(spec.feed_forward_width)) != 1:
        raise _unsupported(spec, "its layers differ in heads or widths, equal ones")
    if spec.value_head_size != head_size or spec.num_heads % spec.num_kv_heads[0]:
        raise _unsupported(
            spec, "keys and values differ in size, or heads do not share them evenly"
        )
    if keys.number("rope.dimension_count", head_size) != head_size:
        raise _unsupported(spec, "rotary turns a part of each head, whole heads")
    is_gemma = architecture.is_gemma
    window = spec.sliding_window if is_gemma else None
    if spec.sliding_window and not is_gemma:
        raise _unsupported(spec, "it has sliding windows, which are known of gemma3 alone; none")
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
    """Return by what positions are divided; other ways of scaling are refused."""
    kind = keys.of_architecture("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise _unsupported(spec, f"its rotary positions are scaled by {kind!r}, linear or none")
    old = keys.number("rope.scale_linear", 1.0)
    return keys.number("rope.scaling.factor", old) if kind == "linear" else old


def _unsupported(spec: ModelSpec, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{spec.path} cannot be converted: {reason} is wanted; run the GGUF file itself"
    )
