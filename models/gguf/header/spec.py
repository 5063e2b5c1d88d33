"""Reads GGUF headers into a ModelSpec: what the keys mean, and which weights a pass reads together.

Key names follow the GGUF specification ("general.*", "<architecture>.*", "tokenizer.*"). Of the weights only
the output norm is read, for the model's fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lowtide.models.arguments.values import plain_name, shown
from lowtide.models.errors import BadModelFile
from lowtide.models.facts.store import Facts
from lowtide.models.files.fingerprint import DIGITS
from lowtide.models.gguf.header.file_types import file_type_name
from lowtide.models.gguf.header.kind import POOLINGS, header_kind
from lowtide.models.gguf.header.reader import (
    TYPE_NUMBERS,
    ArrayValue,
    GgufContents,
    TensorInfo,
    read_gguf,
)
from lowtide.models.gguf.header.repacked import repacked_names
from lowtide.models.gguf.header.sliding import sliding_layers
from lowtide.models.gguf.header.stored_spec import store_spec, stored_spec
from lowtide.models.spec import KV_PADDING, ModelSpec, VocabularySpec, WeightGroup, WeightSpan

MAX_REASONABLE = 1 << 24
"""No width or head count of a real model comes near this: more is a broken header."""
MAX_LAYERS = 4096
MAX_UINT32 = (1 << 32) - 1
MAX_CONTEXT = (1 << 31) - KV_PADDING
"""llama.cpp counts positions in 32 bits with a sign."""
READ_BYTES = 1 << 20
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")
ATTENTION_OUTPUT = ".attn_output"
"""In the name of every tensor of a layer's attention output projection."""
MATRIX_TYPES = frozenset(TYPE_NUMBERS) - set("F64 I8 I16 I32 I64 Q8_1 Q8_K".split())
"""The types of matrices that every ggml since 2024 multiplies with."""
MIN_MATRIX = 32
"""No matrix of a real model has fewer rows or columns; other tensors of two dimensions do."""
_LAYER = re.compile(r"^blk\.(\d+)\.")
OUTPUT_NORM = "output_norm.weight"


def read_spec(path: Path) -> ModelSpec:
    """Read the spec of the model at `path`; a split model is opened by its first part.

    A stored spec is returned where no file changed. Raises `ModelNotFound` or `BadModelFile` with what is wrong and
    what to change.
    """
    facts = Facts.about("header", path)
    stored = stored_spec(facts, path)
    if stored is not None:
        return stored
    first = read_gguf(path)
    parts = [first, *(read_gguf(part) for part in _other_parts(first))]
    spec = _Keys(first).spec(parts)
    store_spec(facts, spec, Path(__file__))
    return spec


def _other_parts(first: GgufContents) -> list[Path]:
    num_parts = first.metadata.get("split.count", 1)
    if not isinstance(num_parts, int) or num_parts <= 1:
        return []
    match = _SPLIT_NAME.match(first.path.name)
    if match is None or int(match["parts"]) != num_parts:
        raise BadModelFile(
            f"{first.path} is one of {num_parts} parts, but is not named like one: "
            f"name the files NAME-00001-of-{num_parts:05}.gguf as they were published"
        )
    if int(match["part"]) != 1:
        raise BadModelFile(
            f"{first.path} is part {int(match['part'])} of {num_parts}: open the first part, "
            f"{match['stem']}-00001-of-{num_parts:05}.gguf"
        )
    others = []
    for part in range(2, num_parts + 1):
        other = first.path.with_name(f"{match['stem']}-{part:05}-of-{num_parts:05}.gguf")
        if not other.is_file():
            raise BadModelFile(
                f"{other} is missing: put all {num_parts} parts of the model into one folder"
            )
        others.append(other)
    return others


class _Keys:
    """Typed lookups in one file's metadata, with errors that name the key."""

    def __init__(self, contents: GgufContents) -> None:
        self.contents = contents
        self.architecture = self.text("general.architecture")

    def spec(self, parts: list[GgufContents]) -> ModelSpec:
        num_layers = self.number("block_count", most=MAX_LAYERS)
        width = self.number("embedding_length")
        num_heads = max(self.per_layer("attention.head_count", num_layers, default=1))
        kv_heads = self.per_layer("attention.head_count_kv", num_layers, default=num_heads)
        head_size = -(-width // max(num_heads, 1))
        tensors = [tensor for part in parts for tensor in part.tensors]
        layer_bytes = Counter[str]()
        for tensor in tensors:
            layer_bytes[tensor.type_name] += tensor.num_bytes if "blk." in tensor.name else 1
        return ModelSpec(
            paths=tuple(part.path for part in parts),
            name=plain_name(self.text("general.name", default=self.contents.path.stem)),
            architecture=self.architecture,
            quantisation=self._quantisation(layer_bytes),
            num_layers=num_layers,
            embedding_width=width,
            feed_forward_width=self._feed_forward_width(num_layers),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            key_head_dim=self.number("attention.key_length", default=head_size),
            value_head_dim=self.number("attention.value_length", default=head_size),
            context_length=min(self.number("context_length", most=MAX_UINT32), MAX_CONTEXT),
            sliding_window=self.number("attention.sliding_window", default=0) or None,
            sliding_layers=sliding_layers(self.contents.metadata, self.architecture, num_layers),
            recurrent_state_bytes=self._recurrent_state_bytes(num_layers),
            vocabulary=self._vocabulary(),
            weight_bytes=sum(tensor.num_bytes for tensor in tensors),
            file_bytes=sum(part.file_bytes for part in parts),
            tensor_types=frozenset(layer_bytes),
            chat_template=self.optional_text("tokenizer.chat_template"),
            fingerprint=fingerprint(parts),
            weight_groups=weight_groups(parts),
            repacked_tensors=tuple(name for part in parts for name in repacked_names(part)),
            header_bytes=sum(part.metadata_end for part in parts),
            header_keys=sum(part.num_keys for part in parts),
            header_texts=sum(part.num_texts for part in parts),
            header_long_texts=sum(part.num_long_texts for part in parts),
            header_copied_bytes=sum(part.copied_bytes for part in parts),
            longest_header_text=max(part.longest_text for part in parts),
            header_array_bytes=max(part.array_bytes for part in parts),
            num_tensors=len(tensors),
            kind=header_kind(
                self.contents.metadata.get(f"{self.architecture}.attention.causal"),
                (tensor.name for tensor in tensors),
            ),
            pooling=self._pooling(),
            warnings=self._warnings(),
            unusual_tensors=unusual_tensors(tensors),
        )

    def _pooling(self) -> str | None:
        number = self.contents.metadata.get(f"{self.architecture}.pooling_type")
        if not isinstance(number, int) or not 0 <= number < len(POOLINGS):
            return None
        return POOLINGS[number]

    def _quantisation(self, layer_bytes: Counter[str]) -> str:
        """Return the file's own name of its type, or the type of most bytes in the layers."""
        stated = self.contents.metadata.get("general.file_type")
        name = file_type_name(stated, layer_bytes)
        return name or (layer_bytes.most_common(1)[0][0] if layer_bytes else "none")

    def _feed_forward_width(self, num_layers: int) -> tuple[int, ...]:
        """Return the feed-forward width of each layer: that of all experts that a token passes through."""
        experts = self.number("expert_feed_forward_length", default=0) * self.number(
            "expert_used_count", default=0
        ) + self.number("expert_shared_feed_forward_length", default=0)
        dense = self.per_layer("feed_forward_length", num_layers, default=0)
        return tuple(max(width, experts) for width in dense)

    def _recurrent_state_bytes(self, num_layers: int) -> int:
        inner = self.number("ssm.inner_size", default=0)
        state = self.number("ssm.state_size", default=0)
        convolution = self.number("ssm.conv_kernel", default=0)
        groups = self.number("ssm.group_count", default=0)
        rows = inner * state + max(convolution - 1, 0) * (inner + 2 * groups * state)
        return 4 * num_layers * rows

    def _vocabulary(self) -> VocabularySpec:
        tokens = self.contents.metadata.get("tokenizer.ggml.tokens")
        merges = self.contents.metadata.get("tokenizer.ggml.merges")
        if not isinstance(tokens, ArrayValue) or tokens.length == 0:
            raise self.wrong("tokenizer.ggml.tokens", "is missing, so the model has no vocabulary")
        return VocabularySpec(
            num_tokens=tokens.length,
            num_merges=merges.length if isinstance(merges, ArrayValue) else 0,
            text_bytes=tokens.text_bytes,
        )

    def _warnings(self) -> tuple[str, ...]:
        pairs = self.optional_text("tokenizer.ggml.model") == "gpt2"
        if pairs and not self.optional_text("tokenizer.ggml.pre"):
            return (
                "the file does not say how its tokenizer cuts words (tokenizer.ggml.pre), so llama.cpp guesses, and "
                "answers may be worse: download a newer GGUF file of the model",
            )
        return ()

    def wrong(self, key: str, reason: str) -> BadModelFile:
        return BadModelFile(
            f"{self.contents.path}: the header's {key} {reason}; "
            "the file is broken or not a language model"
        )

    def optional_text(self, key: str) -> str | None:
        value = self.contents.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, f"is {shown(value)}; it must be a string")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.optional_text(key) or default
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def number(self, name: str, default: int | None = None, most: int = MAX_REASONABLE) -> int:
        key = f"{self.architecture}.{name}"
        value = self.contents.metadata.get(key, default)
        if isinstance(value, ArrayValue) and value.values:
            value = max((item for item in value.values if isinstance(item, int)), default=default)
        if value is None:
            raise self.wrong(key, "is missing")
        return self._checked(key, value, least=1 if default is None else 0, most=most)

    def per_layer(self, name: str, num_layers: int, default: int) -> tuple[int, ...]:
        key = f"{self.architecture}.{name}"
        value = self.contents.metadata.get(key, default)
        if not isinstance(value, ArrayValue):
            return (self._checked(key, value, least=0),) * num_layers
        if value.values is None or value.length < num_layers:
            raise self.wrong(key, f"has {value.length} entries for {num_layers} layers")
        return tuple(self._checked(key, item, least=0) for item in value.values[:num_layers])

    def _checked(self, key: str, value: object, least: int, most: int = MAX_REASONABLE) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, f"is {shown(value)}; it must be a whole number")
        if not least <= value <= most:
            raise self.wrong(key, f"is {value}; it must be between {least} and {most}")
        return value


def unusual_tensors(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Return the tensors, as "NAME (TYPE)", that ggml may have no kernel for: neither F32 nor a plain matrix.

    Every graph takes F32, and every type that ggml multiplies with in a matrix. Norms, biases, convolutions and states
    in F16, and whatever has a type that only ggml itself computes with, run for some architectures alone.
    """
    return tuple(
        f"{tensor.name} ({tensor.type_name})"
        for tensor in tensors
        if tensor.type_name != "F32"
        and (
            tensor.type_name not in MATRIX_TYPES
            or len(tensor.shape) < 2
            or tensor.shape[0] % MIN_MATRIX
            or tensor.shape[1] < MIN_MATRIX
        )
    )


def weight_groups(parts: Sequence[GgufContents]) -> tuple[WeightGroup, ...]:
    """Return one group per layer, in order, and one per tensor outside the layers."""
    layers = defaultdict[int, list[WeightSpan]](list)
    projection_bytes = Counter[int]()
    others = []
    for part_number, part in enumerate(parts):
        for tensor in part.tensors:
            span = WeightSpan(part_number, part.data_start + tensor.offset, tensor.num_bytes)
            match = _LAYER.match(tensor.name)
            if match is None:
                others.append(WeightGroup(None, (span,), tensor.name))
                continue
            layer = int(match[1])
            layers[layer].append(span)
            if ATTENTION_OUTPUT in tensor.name:
                projection_bytes[layer] += tensor.num_bytes
    by_layer = (
        WeightGroup(layer, _joined(layers[layer]), projection_bytes=projection_bytes[layer])
        for layer in sorted(layers)
    )
    return (*by_layer, *others)


def _joined(spans: Iterable[WeightSpan]) -> tuple[WeightSpan, ...]:
    """Return the spans in order; those that touch, alignment between tensors aside, become one."""
    joined: list[WeightSpan] = []
    for span in sorted(spans, key=lambda s: (s.part, s.offset)):
        last = joined[-1] if joined else None
        gap = span.offset - (last.offset + last.num_bytes) if last else -1
        if last is not None and last.part == span.part and 0 <= gap < 4096:
            end = span.offset + span.num_bytes
            joined[-1] = WeightSpan(last.part, last.offset, end - last.offset)
        else:
            joined.append(span)
    return tuple(joined)


def fingerprint(parts: Sequence[GgufContents]) -> str:
    """Return 32 hexadecimal digits, the same for all quantisations of a model and different after training.

    They cover the names and shapes of all tensors and the output norm, which every quantisation keeps in F32.
    """
    digest = hashlib.sha256()
    tensors = [(tensor, part) for part in parts for tensor in part.tensors]
    for tensor, _ in sorted(tensors, key=lambda pair: pair[0].name):
        digest.update(f"{tensor.name} {tensor.shape}\n".encode())
    for tensor, part in tensors:
        if tensor.name == OUTPUT_NORM and tensor.type_name == "F32":
            for data in _data(tensor, part):
                digest.update(data)
    return digest.hexdigest()[:DIGITS]


def _data(tensor: TensorInfo, part: GgufContents) -> Iterator[bytes]:
    """Yield the tensor's bytes, a few at a time: the header alone says how many there are."""
    with part.path.open("rb") as file:
        file.seek(part.data_start + tensor.offset)
        left = tensor.num_bytes
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            left -= len(data)
            yield data
