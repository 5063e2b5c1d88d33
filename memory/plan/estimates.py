"""What each owner of memory needs, in bytes, as formulas over a ModelSpec.

Knows no budget and makes no choice. The KV formula is exact; the others are upper bounds, each held
against measurements by `tests/memory/test_footprint.py`.

ContextSizes: what llama.cpp allocates for a context. By formulas here; `runtime` has it simulated."""

from __future__ import annotations

from typing import Protocol

from lowtide.memory.plan import estimates as footprint
from lowtide.memory.process import ProcessMemory
from lowtide.memory.units import KIB, MIB
from lowtide.models.spec import ModelSpec, VocabularySpec


class ContextSizes(Protocol):
    """Bytes by context in tokens, rows a pass and KV type."""

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes."""
        ...

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the compute buffer's bytes."""
        ...

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return what a second context on the same weights takes beside its cache."""
        ...


class FormulaSizes:
    """The formulas of `footprint`: exact for the cache, an upper bound for the compute buffer."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes, exactly."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return at least the compute buffer's bytes."""
        return footprint.compute_bytes(self._spec, context, batch_size, kv_type)

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return a compute buffer of its own, and a row of logits."""
        computing = self.compute_bytes(context, batch_size, kv_type)
        return footprint.second_context_bytes(self._spec, computing)


INTERPRETER_BYTES = 49 * MIB
"""Python, numpy, jinja2, click and llama.cpp's libraries: 44 to 51 MiB measured with CPython 3.11.

Where the page cache holds a library in large pieces, more of it is mapped with each page that is read.
"""
LIBRARIES_BYTES = 31 * MIB
"""What those libraries add to a process that has not loaded them."""
RESERVE_BYTES = 2 * MIB
"""Growth of small things, and what the allocator holds between them."""

CONTEXT_BYTES = MIB
"""What a llama.cpp context takes beside its cache, its compute buffer and its row of logits."""

REPACKED_TYPES = frozenset({"Q4_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "MXFP4"})
REPACKED_TYPES_ELSEWHERE = frozenset({"Q8_0", "Q5_K", "Q6_K"})
"""Types that llama.cpp packs into a layout of its own, on x86-64 and on other processors."""

LARGE_TENSOR_BYTES = 2 * MIB
"""A tensor outside of the layers above this is read in slices (`native/llama_hook.cpp`)."""
EMBEDDING_ROW_BYTES = 192 * KIB
"""A row of an embedding brings at most two blocks of 64 KiB with it."""
STREAM_SLICE_BYTES = MIB + 256 * KIB
"""A slice of the output's matrix, with the blocks around it; each thread has one."""
STREAM_EDGE_BYTES = MIB
"""Pages around a group of weights that are mapped or stay with it: 64 KiB at each end of a few spans."""

PROFILER_SPANS = 50_000
PROFILER_SAMPLES = 2_000
"""How many spans, and how many samples and timed passes, a profiler keeps at most."""

KV_PADDING = 256
"""llama.cpp rounds the cells of a KV cache up to this."""
BLOCK_BYTES = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Elements and bytes of a block of each KV type."""
SAMPLING_COPIES = 7
"""Vocabulary-sized float arrays alive at once: llama.cpp's two rows, and the sampler's five at most."""
PROMPT_BYTES_PER_TOKEN = 12
"""Text admitted for each token of context: about three times what natural text takes."""
MIN_PROMPT_BYTES = 16 * KIB

SESSION_CHUNK_BYTES = 256 * KIB
"""How much of a session file is checked at once."""
JSON_COPIES = 16
"""Bytes of memory for each byte of JSON that is read: 14 measured at the worst (messages of one letter)."""


def interpreter_bytes(process: ProcessMemory) -> int:
    """Return what the process needs before any model, given what it already has resident.

    A small process is planned at a fixed figure, so that the same command plans the same every time;
    one that is already large (lowtide inside a bigger program) at its own size.
    """
    grown = process.resident_bytes + LIBRARIES_BYTES
    step = 8 * MIB
    return max(INTERPRETER_BYTES, grown // step * step if grown > 2 * INTERPRETER_BYTES else 0)


def vocabulary_bytes(vocabulary: VocabularySpec) -> int:
    """Return the heap of a loaded vocabulary: two tables over the tokens, one over the merges."""
    return (
        2 * MIB + 160 * vocabulary.num_tokens + 2 * vocabulary.text_bytes
        + 180 * vocabulary.num_merges
    )  # fmt: skip


def loading_bytes(spec: ModelSpec) -> int:
    """Return what loading needs for a moment: the header's arrays as llama.cpp reads them, and copies."""
    vocabulary = spec.vocabulary
    headers = 2 * MIB + 48 * (vocabulary.num_tokens + vocabulary.num_merges)
    return headers + spec.copying_bytes


def is_repacked(spec: ModelSpec, processor: str) -> bool:
    """Whether llama.cpp copies some weights into a layout of its own on this kind of processor.

    Through a memory map such a model would keep both copies resident.
    """
    on_x86 = processor.lower() in ("x86_64", "amd64")
    types = REPACKED_TYPES if on_x86 else REPACKED_TYPES | REPACKED_TYPES_ELSEWHERE
    return not spec.tensor_types.isdisjoint(types)


def weight_bytes(spec: ModelSpec, *, memory_map: bool) -> int:
    """Return the weights' resident bytes: the mapped file in full, or the tensors copied."""
    return spec.copied_bytes + (spec.file_bytes if memory_map else spec.weight_bytes)


def streamed_weight_bytes(
    spec: ModelSpec, resident_layers: int, batch_size: int, threads: int
) -> int:
    """Return the most that is resident of mapped weights of which all but the first `resident_layers` layers
    are given back once they were read.

    That is two layers, as one ends and the next begins, or a tensor outside of the layers: as a whole where
    it is small; of an embedding the rows of a pass, of the output's matrix a slice a thread.
    """
    layers = [g.num_bytes for g in spec.weight_groups if g.layer is not None]
    others = [g.num_bytes for g in spec.weight_groups if g.layer is None]
    in_parts = max(
        batch_size * EMBEDDING_ROW_BYTES, threads * STREAM_SLICE_BYTES, LARGE_TENSOR_BYTES
    )
    passing = [min(num_bytes, in_parts) for num_bytes in others]
    streamed = sum(sorted(layers[resident_layers:])[-2:])
    kept = sum(layers[:resident_layers])
    most = kept + max([streamed, *passing], default=0) + STREAM_EDGE_BYTES
    return min(most, weight_bytes(spec, memory_map=True))


def kv_bytes(spec: ModelSpec, context: int, kv_type: str) -> int:
    """Return the KV cache for `context` tokens, the sum over layers of both rows of every cell."""
    rows = spec.cache_copies * sum(_kv_rows(spec, kv_type))
    return padded_context(context) * rows + spec.recurrent_state_bytes


def kv_layer_bytes(spec: ModelSpec, layer: int, context: int, kv_type: str) -> int:
    """Return one layer's part of the KV cache."""
    rows = _kv_rows(spec, kv_type)[2 * layer : 2 * layer + 2]
    return padded_context(context) * sum(rows) + spec.recurrent_state_bytes // spec.num_layers


def filter_layers_bytes(spec: ModelSpec, num_layers: int, context: int, kv_type: str) -> int:
    """Return the part of the KV cache that the first `num_layers` layers have."""
    layers = range(min(num_layers, spec.num_layers))
    return sum(kv_layer_bytes(spec, layer, context, kv_type) for layer in layers)


def kv_token_bytes(spec: ModelSpec, kv_type: str) -> int | None:
    """Return the bytes of a cell in each of the cache's tensors; None where they are not all alike."""
    rows = set(_kv_rows(spec, kv_type))
    return rows.pop() if len(rows) == 1 and not spec.recurrent_state_bytes else None


def _kv_rows(spec: ModelSpec, kv_type: str) -> list[int]:
    """The bytes of a cell in every tensor of the cache, layer after layer."""
    elements, block = BLOCK_BYTES[kv_type]
    return [
        -(-heads * size // elements) * block
        for heads in spec.num_kv_heads
        for size in (spec.key_head_dim, spec.value_head_dim)
    ]


def padded_context(context: int) -> int:
    """Return how many tokens llama.cpp makes room for."""
    return -(-context // KV_PADDING) * KV_PADDING


def supports_kv_type(spec: ModelSpec, kv_type: str) -> bool:
    """Whether the heads divide into the type's blocks."""
    elements, _ = BLOCK_BYTES[kv_type]
    return spec.key_head_dim % elements == 0 and spec.value_head_dim % elements == 0


def compute_bytes(spec: ModelSpec, context: int, batch_size: int, kv_type: str) -> int:
    """Return llama.cpp's compute buffer: `batch_size` rows a pass, flash attention, one row of logits.

    Exact for llama is batch_size * (4 * (3 F + 3 E + H D) + 24 + 2 * context) with feed-forward width F,
    embedding width E, H heads of D; a quantised cache adds up to half of it again.
    """
    feed_forward = max(spec.feed_forward_width)
    heads = spec.num_heads * max(spec.key_head_dim, spec.value_head_dim)
    num_masks = 2 if spec.sliding_window else 1
    row = 4 * (3 * feed_forward + 4 * spec.embedding_width + 2 * heads) + 64
    cells = padded_context(context)
    total = batch_size * (row + num_masks * 2 * cells)
    return total if kv_type == "f16" else total * 3 // 2


def second_context_bytes(spec: ModelSpec, compute_bytes: int) -> int:
    """Return what another llama.cpp context takes beside its cache, with a compute buffer of so much."""
    return compute_bytes + CONTEXT_BYTES + 4 * spec.vocabulary.num_tokens


def logits_bytes(spec: ModelSpec) -> int:
    """Return one row of logits in llama.cpp and the sampler's scratch over it."""
    return 4 * SAMPLING_COPIES * spec.vocabulary.num_tokens


def attention_bytes(spec: ModelSpec, context: int, threads: int) -> int:
    """Return the scratch of our attention kernels.

    Each thread holds a block of 64 keys and values in f32 and the masks of 64 rows over it; beside that
    stand the partial sums of up to 8 rows over every chunk of 256 keys, and of two tiles of 64 rows a
    thread.
    """
    group = -(-spec.num_heads // max(min(filter(None, spec.num_kv_heads), default=1), 1))
    sums = 4 * (2 + spec.value_head_dim)
    split = 8 * spec.num_heads * -(-padded_context(context) // 256) * sums
    tiled = 2 * 64 * group * threads * sums
    return split + tiled + threads * 4 * 64 * (2 * 256 + 72)


def max_matmul_width(spec: ModelSpec) -> int:
    """Return the most columns that a matrix of the layers has."""
    heads = spec.num_heads * max(spec.key_head_dim, spec.value_head_dim)
    return max(spec.embedding_width, heads, *spec.feed_forward_width)


def matmul_scratch_bytes(spec: ModelSpec, batch_size: int) -> int:
    """Return what products of packed weights take: a pass's rows in 8 bits, with a scale and three sums for
    every 32 values, both in an odd number of cache lines a row."""
    return batch_size * (max_matmul_width(spec) * 3 // 2 + 256) + 256


def profiler_bytes(num_layers: int) -> int:
    """Return the most that a profiler keeps: spans, samples, and the passes whose layers it timed."""
    spans = (
        PROFILER_SPANS * 5 * 8 * 9 // 8
    )  # five numbers each, in an array that grows by an eighth
    samples = PROFILER_SAMPLES * 2 * KIB  # a value an owner
    passes = PROFILER_SAMPLES * (512 + 2 * num_layers * 40)  # two tuples of whole numbers
    return spans + samples + passes


def comparison_bytes(spec: ModelSpec, num_rows: int) -> int:
    """Return what `num_rows` kept distributions take, and the arrays that compare two of them."""
    return 4 * (num_rows + 8) * spec.vocabulary.num_tokens


def session_bytes(
    spec: ModelSpec,
    num_tokens: int,
    kv_type: str,
    num_text_bytes: int,
    num_state_bytes: int | None = None,
) -> int:
    """Return what a session file takes for a moment while it is written or read.

    llama.cpp moves one tensor of the cache at a time through a buffer, which may grow once; the file is
    checked in chunks; `num_text_bytes` of JSON become objects. No tensor is larger than the file's state
    where that is known to have `num_state_bytes`.
    """
    largest = max(max(_kv_rows(spec, kv_type)) * num_tokens, spec.recurrent_state_bytes)
    if num_state_bytes is not None:
        largest = min(largest, num_state_bytes)
    return 2 * largest + SESSION_CHUNK_BYTES + JSON_COPIES * num_text_bytes


def prompt_limit_bytes(context: int) -> int:
    """Return the longest text, in UTF-8 bytes, that is tokenised for a context."""
    return max(PROMPT_BYTES_PER_TOKEN * context, MIN_PROMPT_BYTES)


def tokenising_bytes(spec: ModelSpec, text_bytes: int) -> int:
    """Return what tokenising a text of so many UTF-8 bytes takes for a moment."""
    return spec.tokenising_bytes * text_bytes


def prompt_bytes(spec: ModelSpec, context: int) -> int:
    """Return what the longest admitted prompt takes while it is tokenised."""
    return tokenising_bytes(spec, prompt_limit_bytes(context))
