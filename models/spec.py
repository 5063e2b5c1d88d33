"""ModelSpec: everything that a memory plan needs to know of a model, read from its headers alone.

`models/gguf/header/spec.py` and `models/onnx/read_spec.py` make it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowtide.models.kind import DECODER, Kind

TILE_ROWS = 16
"""Rows of a matrix that are repacked together (`attention/native/matmul/repack.h`)."""
TILE_ALIGNMENT = 64
"""Repacked matrices begin at a multiple of this in their file."""
KV_PADDING = 256
"""KV caches have a multiple of so many slots: llama.cpp pads to it, and in lowtide's caches every head begins
at a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularySpec:
    """The size of a vocabulary; `text_bytes` is the sum of the tokens' lengths in bytes."""

    num_tokens: int
    num_merges: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Bytes [offset, offset + num_bytes) of the model's file number `part`."""

    part: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Weights that a forward pass reads together: those of `layer`, or one tensor outside the layers.

    `name` is the name of such a single tensor. `projection_bytes` are the bytes of the layer's attention
    output projection.
    """

    layer: int | None
    spans: tuple[WeightSpan, ...]
    name: str = ""
    projection_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """The weights' own bytes."""
        return sum(span.num_bytes for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape and size of a model.

    `num_kv_heads` and `feed_forward_width` have one entry per layer, 0 where a layer has none.
    `sliding_window` is None where every layer attends to the whole context; `sliding_layers` are the layers that
    do not, None where that is not known. `weight_bytes` is the size of all
    tensors, over every part of a split file; `tensor_types` are their quantisation types. `fingerprint` is
    the same for every quantisation of a model. `weight_groups` says where the weights lie in the files, layer
    by layer and then the other tensors; it is empty where that is unknown. `repacked_tensors` names the
    tensors that only lowtide's matmul kernels can read (`models/gguf/header/repacked.py`).

    `engine` is the library that runs the model. The KV cache has one of `kv_types` and exists `cache_copies`
    times. `copied_bytes` is the size of weights copied beside the mapped files, less what can be released of
    these; making the copies takes `copying_bytes` more for a moment. `tokenising_bytes` is the peak growth
    per byte of text while it is tokenised: llama.cpp's is 123 at worst (one word of blanks), 18 to 48 for
    natural text. `header_bytes` is the size of the header's keys and values, `header_keys` the number of keys,
    `header_texts` that of strings in arrays, `header_long_texts` that of those of more than 15 bytes,
    `header_copied_bytes` the size of keys and other strings, `longest_header_text` the longest of these,
    `header_array_bytes` what the largest array takes for a moment while it is logged, `num_tensors` the number of
    tensors; 0 where they are not known. `warnings` are sentences about what the header lacks: the model runs, but may
    answer worse.

    `kind` says what the model is for. `pooling` is how its header makes one embedding from those of all tokens
    ("mean", "cls", ...), None where it does not say. `unusual_tensors` names
    tensors, with their types, that the engine may have no kernel for.

    `no_copy_reason` says why weights that are to be repacked have no copy on the disk; they are then repacked in memory
    while the model loads. None where there is a copy, or none is asked for.
    """

    paths: tuple[Path, ...]
    name: str
    architecture: str
    quantisation: str
    num_layers: int
    embedding_width: int
    feed_forward_width: tuple[int, ...]
    num_heads: int
    num_kv_heads: tuple[int, ...]
    key_head_dim: int
    value_head_dim: int
    context_length: int
    sliding_window: int | None
    recurrent_state_bytes: int
    vocabulary: VocabularySpec
    weight_bytes: int
    file_bytes: int
    tensor_types: frozenset[str]
    chat_template: str | None
    fingerprint: str
    sliding_layers: tuple[int, ...] | None = None
    weight_groups: tuple[WeightGroup, ...] = ()
    repacked_tensors: tuple[str, ...] = ()
    engine: str = "llama.cpp"
    kv_types: tuple[str, ...] = ("f16", "q8_0", "q4_0")
    cache_copies: int = 1
    copied_bytes: int = 0
    copying_bytes: int = 0
    tokenising_bytes: int = 128
    header_bytes: int = 0
    header_keys: int = 0
    header_texts: int = 0
    header_long_texts: int = 0
    header_copied_bytes: int = 0
    longest_header_text: int = 0
    header_array_bytes: int = 0
    num_tensors: int = 0
    unusual_tensors: tuple[str, ...] = ()
    kind: Kind = DECODER
    pooling: str | None = None
    warnings: tuple[str, ...] = ()
    no_copy_reason: str | None = None

    @property
    def full_layers(self) -> tuple[int, ...] | None:
        """The layers that attend to the whole context; None where that is not known."""
        if self.sliding_window is None:
            return tuple(range(self.num_layers))
        if self.sliding_layers is None:
            return None
        return tuple(layer for layer in range(self.num_layers) if layer not in self.sliding_layers)

    def visible_keys(self, num_tokens: int) -> list[int]:
        """Return how many of `num_tokens` cached keys each layer sees: all, or those in its sliding window."""
        full = set(self.full_layers or ())
        window = self.sliding_window or num_tokens
        layers = range(self.num_layers)
        return [num_tokens if layer in full else min(num_tokens, window) for layer in layers]

    @property
    def path(self) -> Path:
        """The file to open; of a split model, its first part."""
        return self.paths[0]
