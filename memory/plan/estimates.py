"""The formulas behind a memory plan: bytes of each term, from a ModelSpec.

This is the last of the three files behind a number in `lowtide plan` (cli/plan.py, memory/plan/lines.py,
here). The formula of the KV cache is exact. The others are upper bounds, and tests/memory/plan/test_estimates.py
compares each with measurements. Where llama.cpp can lay a model out beforehand, the backend replaces
`FormulaSizes` by a `ContextSizes` that asks llama.cpp.
"""

from __future__ import annotations

from typing import Protocol

from lowtide.memory.process import ProcessMemory
from lowtide.memory.units import KIB, MIB
from lowtide.models.spec import KV_PADDING as KV_PADDING
from lowtide.models.spec import ModelSpec, VocabularySpec
from lowtide.models.template.families import LONGEST_TEMPLATE


class ContextSizes(Protocol):
    """Sizes of a context in bytes, by context length in tokens, batch size and KV type."""

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the bytes of the whole KV cache."""
        ...

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the bytes of the compute buffer."""
        ...

    def slot_bytes(self, context: int, num_used: int) -> int:
        """Return the bytes of the engine's own list of `context` KV slots, of which `num_used` hold a token."""
        ...

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the bytes of a second context on the same weights, without its KV cache."""
        ...


INTERPRETER_BYTES = 49 * MIB
"""Python, numpy, jinja2, click and llama.cpp's libraries: 44 to 51 MiB measured with CPython 3.11.

The number varies with the folio sizes in which the page cache holds the libraries (see
memory/os/shared_libraries.py).
"""
LIBRARIES_BYTES = 31 * MIB
"""How much these libraries add to a process that has not loaded them."""
SLACK_BYTES = MIB
"""The allocator's slack between small allocations."""
STRUCTURED_BYTES = 9 * MIB
"""llguidance's library and its imports (5 MiB), and jsonschema's (4 MiB)."""
GRAMMAR_BYTES = 10 * MIB
"""The largest of 150 grammars with its search for an end; a small schema takes 2 to 3 MiB of these."""
STRUCTURED_TOKEN_BYTES = 300
"""Bytes of a token in llguidance's trie and in the table that it is made from, as measured with 49,152 and 262,144."""
RULE_TOKEN_BYTES = 160
"""Bytes of a token in the order of the vocabulary that rules use (21), in 64 masks (8), and while one is made (39)."""
RESERVE_BYTES = 2 * MIB
"""The least reserve: slack, and the lists of a small model with a short context."""

SHARED_CHUNK_BYTES = 40
"""Bytes of a chunk of keys in the list of those that a sequence shares with others."""
KV_SLOT_BYTES = 52
"""What llama.cpp stores of each KV slot, used or not: its position, shift and sequences (`llama_kv_cells`)."""
USED_SLOT_BYTES = 96
"""Two nodes of sorted sets for each slot that holds a token."""
CONTEXT_BYTES = MIB
"""A llama.cpp context without its KV cache, compute buffer and logits."""

REPACKED_TYPES = frozenset({"Q4_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "MXFP4"})
REPACKED_TYPES_ELSEWHERE = frozenset({"Q8_0", "Q5_K", "Q6_K"})
"""Types that llama.cpp repacks into a layout of its own, on x86-64 and on other processors."""

LARGE_TENSOR_BYTES = 2 * MIB
"""A larger tensor outside of the layers is streamed in slices (attention/native, weight streaming)."""
HELPER_STACK_BYTES = 32 * KIB
"""Of a thread that helps in matmuls: what it touches of its stack and of the structures around it."""
EMBEDDING_ROW_BYTES = 192 * KIB
"""One embedding lookup: the row and at most two blocks of 64 KiB that are mapped with it."""
STREAM_SLICE_BYTES = MIB + 256 * KIB
"""A slice of the output matrix with the blocks around it; one per thread."""
STREAM_EDGE_BYTES = MIB
"""Pages mapped around a weight group: 64 KiB at each end of a few spans."""

TENSOR_BYTES = 2 * KIB
"""What llama.cpp stores of a tensor of the model: 1.5 KiB measured."""
TENSOR_GRAPH_BYTES = 6 * KIB
"""What a context's graph takes for each tensor of the model: 5 KiB measured."""
TENSOR_PASS_BYTES = 4 * KIB
"""What the first pass adds to that: 3 KiB measured."""
TENSORS_PER_LAYER = 12
"""Where their number is not known."""
TEMPLATE_BYTES = 3000
"""What jinja takes for a moment per character of a chat template: at most 2,600 measured, 600 are usual."""
MAX_TEMPLATE_CHARACTERS = 65_536
"""Longer templates are refused without being compiled (`models/template_sandbox.py`)."""
HEADER_KEY_BYTES = 512
"""What a key of the header takes beside its value while llama.cpp reads it: 400 measured."""
HEADER_TEXT_BYTES, HEADER_LONG_TEXT_BYTES = 24, 48
"""What a string of the header takes beside its characters and their number while llama.cpp reads it; a long one lies
in a block of its own."""

PROFILER_SPANS = 50_000
PROFILER_SAMPLES = 2_000
"""The most spans, and the most samples and timed passes, that a profiler records."""

BLOCK_BYTES = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Elements per block and bytes per block of each KV type."""
SAMPLING_COPIES = 7
"""Float arrays of the vocabulary's size at once: two in llama.cpp, at most five in the sampler."""
PROMPT_BYTES_PER_TOKEN = 12
"""The longest prompt in UTF-8 bytes per token of context: about three times that of natural text."""
MIN_PROMPT_BYTES = 16 * KIB

SESSION_CHUNK_BYTES = 256 * KIB
"""How much of a session file is checksummed at once."""
JSON_COPIES = 16
"""Bytes of memory per byte of parsed JSON: 14 measured in the worst case (messages of one letter)."""


def interpreter_bytes(process: ProcessMemory) -> int:
    """Return the bytes of the process without a model, from its resident set now.

    A small process is planned with a constant, so that the same command always gives the same plan. A
    process that is already large (lowtide inside a bigger program) is planned with its own size.
    """
    grown = process.resident_bytes + LIBRARIES_BYTES
    step = 8 * MIB
    return max(INTERPRETER_BYTES, grown // step * step if grown > 2 * INTERPRETER_BYTES else 0)


def vocabulary_bytes(vocabulary: VocabularySpec) -> int:
    """Return the heap of a loaded vocabulary: two tables over the tokens, one over the merges."""
    return (
        2 * MIB + 160 * vocabulary.num_tokens + 3 * vocabulary.text_bytes
        + 180 * vocabulary.num_merges
    )  # fmt: skip


def described_bytes(spec: ModelSpec) -> int:
    """Return what llama.cpp takes for a model and the graph of one context, without weights and KV cache.

    It keeps a copy of the header's strings beside the vocabulary.
    """
    vocabulary = vocabulary_bytes(spec.vocabulary)
    return vocabulary + structure_bytes(spec) + spec.header_copied_bytes


def structure_bytes(spec: ModelSpec) -> int:
    """Return what llama.cpp stores of the model's tensors and of the graph of one context, without any data."""
    num_tensors = spec.num_tensors or TENSORS_PER_LAYER * spec.num_layers
    return num_tensors * (TENSOR_BYTES + TENSOR_GRAPH_BYTES)


def graph_bytes(spec: ModelSpec) -> int:
    """Return what llama.cpp stores of the graph of the last pass, beside that of the context."""
    return TENSOR_PASS_BYTES * (spec.num_tensors or TENSORS_PER_LAYER * spec.num_layers)


def template_bytes(spec: ModelSpec) -> int:
    """Return the temporary memory for compiling the chat template, at most."""
    length = len(spec.chat_template or LONGEST_TEMPLATE)
    return TEMPLATE_BYTES * length if length <= MAX_TEMPLATE_CHARACTERS else 4 * length


def loading_bytes(spec: ModelSpec, header_bytes: int | None = None) -> int:
    """Return the temporary memory of loading: llama.cpp's header, a value of it as text, and copied tensors.

    A measured `header_bytes` replaces the formula of the first two.
    """
    if header_bytes is not None:
        return header_bytes + spec.copying_bytes
    vocabulary = spec.vocabulary
    num_texts = max(spec.header_texts, vocabulary.num_tokens + vocabulary.num_merges)
    keys = HEADER_KEY_BYTES * spec.header_keys + spec.header_bytes
    texts = HEADER_TEXT_BYTES * (num_texts - spec.header_long_texts)
    texts += HEADER_LONG_TEXT_BYTES * spec.header_long_texts
    headers = 2 * MIB + texts + keys
    # Arrays are logged before the vocabulary is made, in memory that it takes later.
    arrays = spec.header_array_bytes - described_bytes(spec)
    return headers + max(spec.longest_header_text, arrays) + spec.copying_bytes


def is_repacked(spec: ModelSpec, processor: str) -> bool:
    """Whether llama.cpp repacks some of the weights on this kind of processor.

    Such a model is not memory-mapped, because both copies would be resident.
    """
    on_x86 = processor.lower() in ("x86_64", "amd64")
    types = REPACKED_TYPES if on_x86 else REPACKED_TYPES | REPACKED_TYPES_ELSEWHERE
    return not spec.tensor_types.isdisjoint(types)


REPACKING_BYTES = 4 * MIB
"""Slices of a matrix as they are read and repacked in memory: three of a mebibyte each."""


def weight_bytes(spec: ModelSpec, *, memory_map: bool) -> int:
    """Return the resident bytes of the weights: the whole mapped file, or the copied tensors."""
    return spec.copied_bytes + (spec.file_bytes if memory_map else spec.weight_bytes)


def streamed_weight_bytes(
    spec: ModelSpec, resident_layers: int, batch_size: int, threads: int
) -> int:
    """Return the peak of the resident bytes of mapped weights if only `resident_layers` layers stay resident.

    Beside them, two layers are resident while one ends and the next begins, or one tensor outside of the
    layers: a small one as a whole, of an embedding the rows of a batch, of the output matrix a slice per
    thread.
    """
    layers = [g.num_bytes for g in spec.weight_groups if g.layer is not None]
    others = [g.num_bytes for g in spec.weight_groups if g.layer is None]
    in_slices = max(
        batch_size * EMBEDDING_ROW_BYTES, threads * STREAM_SLICE_BYTES, LARGE_TENSOR_BYTES
    )
    outside = [min(num_bytes, in_slices) for num_bytes in others]
    streamed = sum(sorted(layers[resident_layers:])[-2:])
    resident = sum(layers[:resident_layers])
    peak = resident + max([streamed, *outside], default=0) + STREAM_EDGE_BYTES
    return min(peak, weight_bytes(spec, memory_map=True))


def kv_bytes(spec: ModelSpec, context: int, kv_type: str) -> int:
    """Return the bytes of the KV cache for `context` tokens: keys and values of every layer and slot."""
    slot_bytes = spec.cache_copies * sum(_kv_tensor_bytes(spec, kv_type))
    return padded_context(context) * slot_bytes + spec.recurrent_state_bytes


def kv_layer_bytes(spec: ModelSpec, layer: int, context: int, kv_type: str) -> int:
    """Return the bytes of one layer's KV cache."""
    slot_bytes = sum(_kv_tensor_bytes(spec, kv_type)[2 * layer : 2 * layer + 2])
    return padded_context(context) * slot_bytes + spec.recurrent_state_bytes // spec.num_layers


def filter_layers_bytes(spec: ModelSpec, num_layers: int, context: int, kv_type: str) -> int:
    """Return the bytes of the KV cache of the first `num_layers` layers."""
    layers = range(min(num_layers, spec.num_layers))
    return sum(kv_layer_bytes(spec, layer, context, kv_type) for layer in layers)


def kv_token_bytes(spec: ModelSpec, kv_type: str) -> int | None:
    """Return the bytes of a token in one tensor of the KV cache; None if the tensors differ in that."""
    sizes = set(_kv_tensor_bytes(spec, kv_type))
    return sizes.pop() if len(sizes) == 1 and not spec.recurrent_state_bytes else None


def _kv_tensor_bytes(spec: ModelSpec, kv_type: str) -> list[int]:
    """Return the bytes of a token in every tensor of the cache: keys, values of layer 0, of layer 1, ..."""
    elements, block = BLOCK_BYTES[kv_type]
    return [
        -(-heads * size // elements) * block
        for heads in spec.num_kv_heads
        for size in (spec.key_head_dim, spec.value_head_dim)
    ]


def padded_context(context: int) -> int:
    """Return the number of KV slots that llama.cpp allocates for a context."""
    return -(-context // KV_PADDING) * KV_PADDING


def slot_bytes(spec: ModelSpec, context: int, num_used: int) -> int:
    """Return the bytes of llama.cpp's list of `context` KV slots, of which `num_used` hold a token.

    A model with a sliding window has a list for the layers with one and a list for the others.
    """
    num_lists = 2 if spec.sliding_window else 1
    return num_lists * (KV_SLOT_BYTES * padded_context(context) + USED_SLOT_BYTES * num_used)


def supports_kv_type(spec: ModelSpec, kv_type: str) -> bool:
    """Whether the head dimensions are multiples of the type's block size."""
    elements, _ = BLOCK_BYTES[kv_type]
    return spec.key_head_dim % elements == 0 and spec.value_head_dim % elements == 0


def compute_bytes(spec: ModelSpec, context: int, batch_size: int, kv_type: str) -> int:
    """Return the bytes of llama.cpp's compute buffer with flash attention and the logits of one token.

    For the llama architecture the exact size is batch_size * (4 * (3 F + 3 E + H D) + 24 + 2 * context),
    with feed-forward width F, embedding width E and H heads of dimension D. A quantised cache adds up to
    half of that.
    """
    feed_forward = max(spec.feed_forward_width)
    heads = spec.num_heads * max(spec.key_head_dim, spec.value_head_dim)
    token_bytes = 4 * (3 * feed_forward + 4 * spec.embedding_width + 2 * heads) + 64
    activations = batch_size * token_bytes
    masks = compute_slope(spec, batch_size, kv_type) * padded_context(context)
    return (activations if kv_type == "f16" else activations * 3 // 2) + masks


def compute_slope(spec: ModelSpec, batch_size: int, kv_type: str) -> int:
    """Return by how many bytes llama.cpp's compute buffer grows with each KV slot, at most."""
    num_masks = 2 if spec.sliding_window else 1
    slope = batch_size * num_masks * 2
    return slope if kv_type == "f16" else slope * 3 // 2


def second_context_bytes(spec: ModelSpec, compute_bytes: int, context: int) -> int:
    """Return the bytes of another llama.cpp context without its KV cache, given its compute buffer."""
    slots = slot_bytes(spec, context, context)
    return compute_bytes + slots + CONTEXT_BYTES + 4 * spec.vocabulary.num_tokens


def logits_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one token's logits in llama.cpp and of the sampler's arrays."""
    return 4 * SAMPLING_COPIES * spec.vocabulary.num_tokens


def structured_bytes(vocabulary: VocabularySpec, grammars_bytes: int = 0) -> int:
    """Return the bytes of structured output: llguidance, its token trie, and the grammars.

    Those have room for a common one; larger ones, of `grammars_bytes` in all, take more.
    """
    tokens = STRUCTURED_TOKEN_BYTES * vocabulary.num_tokens
    return STRUCTURED_BYTES + tokens + max(GRAMMAR_BYTES, grammars_bytes)


def rules_bytes(vocabulary: VocabularySpec, num_bytes: int) -> int:
    """Return the bytes of rules that hold `num_bytes` themselves; 0 without rules."""
    return num_bytes + RULE_TOKEN_BYTES * vocabulary.num_tokens if num_bytes else 0


def attention_bytes(spec: ModelSpec, context: int, threads: int) -> int:
    """Return the scratch bytes of lowtide's attention kernels.

    Each thread holds a block of 64 keys and values in fp32 and the masks of 64 queries. In addition there
    are the partial sums of up to 8 queries over every chunk of 256 keys, and of two tiles of 64 queries per
    thread.
    """
    group = -(-spec.num_heads // max(min(filter(None, spec.num_kv_heads), default=1), 1))
    sums = 4 * (2 + spec.value_head_dim)
    split = 8 * spec.num_heads * -(-padded_context(context) // 256) * sums
    tiled = 2 * 64 * group * threads * sums
    return split + tiled + threads * 4 * 64 * (2 * 256 + 72)


def shared_keys_bytes(spec: ModelSpec, context: int, num_rows: int) -> int:
    """Return what lowtide's attention holds of keys that sequences or branches share: the sums of each chunk of 256.

    `num_rows` tokens are decoded in a pass over `context` tokens. The lists of slots are in `branch_bytes`.
    """
    num_chunks = padded_context(context) // 256
    sums = 4 * spec.num_heads * (2 + spec.value_head_dim)
    return num_rows * num_chunks * (sums + SHARED_CHUNK_BYTES)


def max_matmul_width(spec: ModelSpec) -> int:
    """Return the largest number of columns of a weight matrix in the layers."""
    heads = spec.num_heads * max(spec.key_head_dim, spec.value_head_dim)
    return max(spec.embedding_width, heads, *spec.feed_forward_width)


def matmul_scratch_bytes(spec: ModelSpec, batch_size: int) -> int:
    """Return the scratch bytes of lowtide's matmul kernels.

    It holds the activations of a batch in int8, with a scale and three sums for every 32 values; both have
    an odd number of cache lines per token. Short results that lie elsewhere than llama.cpp puts them take 32 KiB.
    """
    return batch_size * (max_matmul_width(spec) * 3 // 2 + 256) + 256 + 32 * KIB


def helper_bytes(spec: ModelSpec, batch_size: int, threads: int) -> int:
    """Return the bytes of the threads that help in lowtide's matmuls: the stack that each touches, and its results.

    Results are copied into place when they are complete: those of one tile for every token, or of 64 KiB.
    """
    quantised_row = max_matmul_width(spec) * 3 // 2 + 256
    return (threads - 1) * (HELPER_STACK_BYTES + max(64 << 10, 64 * batch_size, quantised_row))


def profiler_bytes(num_layers: int) -> int:
    """Return the most bytes that a profiler records: spans, samples, and passes with layer times."""
    spans = (
        PROFILER_SPANS * 5 * 8 * 9 // 8
    )  # five numbers each, in an array that grows by an eighth
    samples = PROFILER_SAMPLES * 2 * KIB  # one value per component
    passes = PROFILER_SAMPLES * (512 + 2 * num_layers * 40)  # two tuples of integers
    return spans + samples + passes


def comparison_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Return the bytes of `num_tokens` next-token distributions, and of the arrays that compare two."""
    return 4 * (num_tokens + 8) * spec.vocabulary.num_tokens


def session_bytes(
    spec: ModelSpec,
    num_tokens: int,
    kv_type: str,
    num_text_bytes: int,
    num_state_bytes: int | None = None,
) -> int:
    """Return the temporary memory for writing or reading a session file.

    llama.cpp copies one tensor of the cache at a time through a buffer, which may grow once. The file is
    checksummed in chunks. `num_text_bytes` of JSON become Python objects. No tensor is larger than the KV
    snapshot in the file, if its `num_state_bytes` are known.
    """
    largest = max(max(_kv_tensor_bytes(spec, kv_type)) * num_tokens, spec.recurrent_state_bytes)
    if num_state_bytes is not None:
        largest = min(largest, num_state_bytes)
    return 2 * largest + SESSION_CHUNK_BYTES + JSON_COPIES * num_text_bytes


def prompt_limit_bytes(context: int) -> int:
    """Return the longest text, in UTF-8 bytes, that is tokenised for a context."""
    return max(PROMPT_BYTES_PER_TOKEN * context, MIN_PROMPT_BYTES)


def tokenising_bytes(spec: ModelSpec, text_bytes: int) -> int:
    """Return the temporary memory for tokenising a text of `text_bytes` UTF-8 bytes."""
    return spec.tokenising_bytes * text_bytes


def prompt_bytes(spec: ModelSpec, context: int) -> int:
    """Return the temporary memory for tokenising the longest accepted prompt."""
    return tokenising_bytes(spec, prompt_limit_bytes(context))


class FormulaSizes:
    """`ContextSizes` by the formulas of this module, for models that cannot be laid out beforehand."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the bytes of the KV cache, exactly."""
        return kv_bytes(self._spec, context, kv_type)

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return an upper bound of the compute buffer's bytes."""
        return compute_bytes(self._spec, context, batch_size, kv_type)

    def slot_bytes(self, context: int, num_used: int) -> int:
        """Return the bytes of llama.cpp's list of KV slots."""
        return slot_bytes(self._spec, context, num_used)

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return an upper bound for a compute buffer, a list of slots and the logits of one token."""
        computing = self.compute_bytes(context, batch_size, kv_type)
        return second_context_bytes(self._spec, computing, context)
