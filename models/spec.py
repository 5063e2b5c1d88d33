"""ModelSpec: everything the planner needs to know of a model, from its headers alone.

Knows no budget and reads no file: `gguf_header` and `onnx.header` fill it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularySpec:
    """What the vocabulary costs and allows.

    `text_bytes` is the sum of the tokens' lengths, `longest_token_bytes` the longest one.
    """

    num_tokens: int
    num_merges: int
    text_bytes: int
    longest_token_bytes: int


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Bytes [offset, offset + num_bytes) of file number `part`."""

    part: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Weights that a pass reads together: those of `layer`, or one tensor outside of all layers.

    `name` is that tensor's; of a layer's bytes `projection_bytes` are those that follow its attention.
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
    """The shape and the size of a decoder-only model.

    `num_kv_heads` and `feed_forward_width` have one entry a layer (0 where a layer has none);
    `sliding_window` is None where every layer sees the whole context. `weight_bytes` counts the
    tensors' data over all parts of a split file, `tensor_types` the quantisation types in use.
    `fingerprint` is the same for every quantisation of a model. `weight_groups` says where in the files the
    weights lie, the layers' in order and then the others; empty where that is not known. `repacked_tensors`
    are the names of those that only our kernels can read (`packed_gguf`).

    `engine` runs it. Its cache can have one of `kv_types`, and `cache_copies` of it are there at a time;
    `copied_bytes` of weights are kept beside the mapped files, less what is let go of these, and making
    the copies takes `copying_bytes` for a moment.
    `tokenising_bytes` is the peak growth while a text is tokenised, for each of its bytes; llama.cpp's is
    123 at the worst (one word of blanks), 18 to 48 for natural text.
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
    weight_groups: tuple[WeightGroup, ...] = ()
    repacked_tensors: tuple[str, ...] = ()
    engine: str = "llama.cpp"
    kv_types: tuple[str, ...] = ("f16", "q8_0", "q4_0")
    cache_copies: int = 1
    copied_bytes: int = 0
    copying_bytes: int = 0
    tokenising_bytes: int = 128

    @property
    def path(self) -> Path:
        """The file to open: the first part of a split one."""
        return self.paths[0]
