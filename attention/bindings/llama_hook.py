"""LlamaHook: lowtide's kernels inside llama.cpp's own graph.

llama.cpp calls an evaluation callback for every node of a graph before it computes the node. The callback is
C++ (`native/llama/hook.cpp`): it replaces each attention node by a node that runs lowtide's kernel, in
llama.cpp's thread pool. It works with an unmodified llama.cpp; nodes that it does not know are left
to llama.cpp and counted.

The hook also streams weights (`LlamaHook.stream_weights`): it evicts the pages of mapped weights once a pass
has read them. The system reads a page from the file again when a node needs it, so results are bitwise the
same. `LayerClock` measures the time of each layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.attention.bindings.library import native_library
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import ScoreRule
from lowtide.memory.os import pages
from lowtide.memory.os.file_mappings import FileMap
from lowtide.models.arguments.names import option
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.model import SequenceSlots
from lowtide.models.spec import ModelSpec, WeightSpan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _GgmlFunctions(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "init free new_tensor_4d view_tensor custom_4d set_name op_name get_type_traits_cpu row_size "
            "backend_buffer_is_host"
        ).split()
    ]


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "layers_native layers_fallback nodes_native nodes_fallback nanoseconds scratch_bytes keys_read "
            "keys_visible weight_bytes_evicted matmuls_streamed matmuls_repacked matmul_steps "
            "repacked_refused".split()
        )
    ]


def ggml_functions() -> _GgmlFunctions:
    """Return the addresses of the ggml functions that the hook calls."""
    library = llama_library()
    names = [field[0] for field in _GgmlFunctions._fields_]
    return _GgmlFunctions(*(library.address(f"ggml_{name}") for name in names))


def declare_hook(library: ctypes.CDLL) -> None:
    """Declare the hook's functions on the native library."""
    pointer = ctypes.c_void_p
    library.lowtide_hook_new.restype = pointer
    library.lowtide_hook_new.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.lowtide_hook_free.argtypes = [pointer]
    library.lowtide_hook_free.restype = None
    library.lowtide_hook_set_active.argtypes = [pointer, ctypes.c_int]
    library.lowtide_hook_set_active.restype = None
    library.lowtide_hook_set_threads.argtypes = [pointer, ctypes.c_int]
    library.lowtide_hook_settle.argtypes = library.lowtide_hook_taken_back.argtypes = [pointer]
    library.lowtide_hook_set_threads.restype = library.lowtide_hook_settle.restype = None
    library.lowtide_hook_taken_back.restype = ctypes.c_int64
    library.lowtide_hook_counts.argtypes = [pointer]
    library.lowtide_hook_counts.restype = _Counts
    library.lowtide_hook_kernels.argtypes = [pointer]
    library.lowtide_hook_kernels.restype = ctypes.c_char_p
    library.lowtide_hook_timer.argtypes = [pointer]
    library.lowtide_hook_timer.restype = pointer
    library.lowtide_hook_policy.argtypes = [pointer]
    library.lowtide_hook_policy.restype = pointer
    library.lowtide_hook_stream_weights.argtypes = [
        pointer,
        pointer,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    library.lowtide_hook_score_prompt.argtypes = [pointer, ctypes.c_int, pointer, ctypes.c_int]
    library.lowtide_hook_score_prompt.restype = None
    library.lowtide_hook_set_batch.argtypes = [
        pointer,
        ctypes.c_int,
        ctypes.c_int,
        pointer,
        pointer,
        pointer,
    ]
    library.lowtide_hook_batches_refused.argtypes = [pointer]
    library.lowtide_hook_batches_refused.restype = ctypes.c_int64
    library.lowtide_hook_copy_slot.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.lowtide_hook_set_repacked.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.lowtide_hook_prompt_scores.argtypes = [pointer, pointer, ctypes.c_int]
    library.lowtide_hook_supports_bf16.argtypes = [pointer]


BLOCK_BYTES = 64 << 10
"""Weights that are read in slices (rows of an embedding, slices of the output matrix) are isolated in blocks
of this size, because Linux maps this much at once (fault-around)."""


class NativeSpan(ctypes.Structure):
    """The C++ `WeightSpan`, field for field."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in "begin end page_begin page_end".split()),
        ("group", ctypes.c_int32),
    ]


def mapped_spans(spec: ModelSpec, maps: Sequence[Collection[FileMap]]) -> list[NativeSpan]:
    """Return the addresses of each group of the model's weights, in ascending order.

    `maps` has one entry for each of the model's files. Raises `LowtideError` if a weight is in no mapping.
    """
    spans = [
        native
        for group, weights in enumerate(spec.weight_groups)
        for span in weights.spans
        for native in _in_memory(span, maps[span.part], group)
    ]
    found = sum(span.end - span.begin for span in spans)
    expected = sum(group.num_bytes for group in spec.weight_groups)
    if found != expected:
        raise LowtideError(
            f"{expected - found} bytes of {spec.name}'s weights are not mapped from its file, so they cannot "
            f"be evicted between passes: raise {option('memory')} so that the weights stay resident"
        )
    return sorted(spans, key=lambda span: int(span.begin))


def _in_memory(span: WeightSpan, maps: Collection[FileMap], group: int) -> Iterator[NativeSpan]:
    for file_map in maps:
        begin = max(span.offset, file_map.offset)
        end = min(span.offset + span.num_bytes, file_map.offset + file_map.num_bytes)
        if begin < end:
            moved = file_map.address - file_map.offset
            yield _with_pages(file_map, begin + moved, end + moved, group)


def _with_pages(file_map: FileMap, begin: int, end: int, group: int) -> NativeSpan:
    """Add the pages of the span, as far as they are whole pages of this file."""
    map_end = file_map.address + pages.round_down(file_map.num_bytes)
    return NativeSpan(begin, end, pages.round_down(begin), min(pages.round_up(end), map_end), group)


def isolate_spans(spec: ModelSpec, spans: Sequence[NativeSpan], maps: Iterable[FileMap]) -> None:
    """Isolate the pages of each span, so that reading one span does not map evicted pages of another.

    Blocks of a weight outside the layers are isolated from each other, too. Raises `LowtideError` if the
    system allows no more memory areas.
    """
    cuts = {
        cut for span in spans for cut in _cuts(span, spec.weight_groups[span.group].layer is None)
    }
    for file_map in maps:
        begin, end = file_map.address, file_map.address + file_map.num_bytes
        if not pages.isolate_pages(
            sorted({begin, end, *(cut for cut in cuts if begin < cut < end)})
        ):
            raise LowtideError(
                f"{spec.name}'s weights need {len(cuts)} memory areas, and the system does not allow as many: "
                f"raise vm.max_map_count, or {option('memory')} so that the weights stay resident"
            )


def _cuts(span: NativeSpan, in_blocks: bool) -> Iterator[int]:
    """Yield the borders of the span: a page that it shares with its neighbour is an area of its own."""
    first, last = pages.round_up(span.begin), pages.round_down(span.end)
    yield from (pages.round_down(span.begin), first, last, pages.round_up(span.end))
    if in_blocks:
        yield from range(-(-first // BLOCK_BYTES) * BLOCK_BYTES, last, BLOCK_BYTES)


REASON_BYTES = 256


class LlamaHook(AttentionKernels):
    """The hook of one llama.cpp context with `threads` threads; it must outlive the context.

    `kernels` names an instruction set (`library.KERNEL_SETS`); None takes the fastest. Raises `LowtideError`
    with the reason if this llama.cpp cannot be hooked.
    """

    def __init__(self, threads: int, kernels: str | None = None) -> None:
        library = native_library()
        declare_hook(library)
        reason = ctypes.create_string_buffer(REASON_BYTES)
        name = kernels.encode() if kernels else None
        functions = ggml_functions()
        self._hook = library.lowtide_hook_new(
            ctypes.byref(functions), name, threads, reason, REASON_BYTES
        )
        if not self._hook:
            raise LowtideError(
                f"lowtide's attention cannot run in this llama.cpp ({reason.value.decode()}): use "
                f"{option('attention', 'llama')}, or install the llama.cpp of llama-cpp-python 0.3.36"
            )
        super().__init__(library, library.lowtide_hook_policy(self._hook))

    @property
    def callback(self) -> tuple[int, int]:
        """The address and the user data for `LoadOptions.eval_callback`."""
        address = ctypes.cast(self._library.lowtide_hook_callback, ctypes.c_void_p).value
        assert address is not None
        return address, self._hook

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.lowtide_hook_kernels(self._hook)
        return name.decode()

    @property
    def clock(self) -> int:
        """The address of the hook's `LayerClock`."""
        address: int = self._library.lowtide_hook_timer(self._hook)
        return address

    def counts(self) -> KernelCounts:
        """Return what the hook has done so far."""
        counts = self._library.lowtide_hook_counts(self._hook)
        return KernelCounts(
            counts.layers_native,
            counts.layers_fallback,
            counts.nodes_native,
            counts.nodes_fallback,
            counts.nanoseconds / 1e9,
            counts.scratch_bytes,
            counts.keys_read,
            counts.keys_visible,
            counts.weight_bytes_evicted,
            counts.matmuls_streamed,
            counts.matmuls_repacked,
            counts.matmul_steps,
            counts.repacked_refused,
            self.blocks.cost(),
        )

    def set_active(self, active: bool) -> None:
        """Use lowtide's attention from the next pass on, or llama.cpp's."""
        self._library.lowtide_hook_set_active(self._hook, active)

    def set_threads(self, num_threads: int) -> None:
        """Let so many threads compute the hook's nodes in the next passes in which ggml has one thread."""
        self._library.lowtide_hook_set_threads(self._hook, num_threads)

    def settle(self) -> None:
        """Wait until no helper thread reads memory of the graph, so that it can be freed."""
        self._library.lowtide_hook_settle(self._hook)

    @property
    def pieces_taken_back(self) -> int:
        """How many pieces of work were computed again, because the helper that had them lost its core."""
        return int(self._library.lowtide_hook_taken_back(self._hook))

    def stream_weights(self, spans: Sequence[NativeSpan], resident: bytes) -> None:
        """Evict the weights of the groups without a flag in `resident` once a pass has read them.

        `spans` are in ascending order of address. Call it between passes.
        """
        array = (NativeSpan * len(spans))(*spans)
        failed = self._library.lowtide_hook_stream_weights(
            self._hook, array, len(spans), resident, len(resident)
        )
        if failed == 2:
            raise ValueError("spans must be in order, and each group must have a flag")
        if failed:
            raise MemoryError

    def read_repacked(self, names: Sequence[str], batch_size: int, max_columns: int) -> None:
        """Read the tensors of these names as repacked ones, in passes of at most `batch_size` tokens.

        `max_columns` is the largest number of columns of one of them. Raises `MemoryError`.
        """
        text = "\n".join(names).encode()
        if self._library.lowtide_hook_set_repacked(self._hook, text, batch_size, max_columns):
            raise MemoryError

    @property
    def supports_bf16(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""
        return bool(self._library.lowtide_hook_supports_bf16(self._hook))

    def set_batch_layout(self, slots: SequenceSlots | None) -> None:
        """Attend to several sequences in the next pass, each over its own slots; None: to one again."""
        if slots is None:
            failed = self._library.lowtide_hook_set_batch(self._hook, 0, 0, None, None, None)
        else:
            num = len(slots.num_rows)
            failed = self._library.lowtide_hook_set_batch(
                self._hook,
                slots.num_shared,
                num,
                (ctypes.c_int32 * num)(*slots.num_rows),
                (ctypes.c_void_p * num)(*(own.buffer_info()[0] for own in slots.own)),
                (ctypes.c_int32 * num)(*map(len, slots.own)),
            )
        if failed:
            raise MemoryError

    @property
    def layouts_refused(self) -> int:
        """How many masks did not match `set_batch_layout`: those passes attended to every slot."""
        return int(self._library.lowtide_hook_batches_refused(self._hook))

    def copy_slot(self, source: int, target: int) -> int:
        """Copy a slot's keys and values over another's; return in how many layers.

        These are the layers that attended to the last batch layout; none if the last pass had no such slots.
        """
        return int(self._library.lowtide_hook_copy_slot(self._hook, source, target))

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """End forward passes behind the attention of `layer`; the last pass of a prompt scores its keys.

        The logits of such a pass mean nothing.
        """
        self._library.lowtide_hook_score_prompt(self._hook, layer, ctypes.byref(rule), is_last)

    def run_whole_passes(self) -> None:
        """Run forward passes through all layers again."""
        self._library.lowtide_hook_score_prompt(self._hook, -1, None, False)

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None if the last pass did not score them."""
        import numpy as np

        scores = np.empty(num_keys, np.float32)
        num_made = self._library.lowtide_hook_prompt_scores(
            self._hook, scores.ctypes.data, num_keys
        )
        return scores if num_made >= num_keys else None

    def close(self) -> None:
        """Free the hook; its context must be closed before."""
        if self._hook:
            self._library.lowtide_hook_free(self._hook)
            self._hook = None


class LayerClock:
    """Measures the time of each layer of forward passes; the hook must outlive it.

    A timed pass stops once a layer, behind the norm that begins the next layer. Results stay bitwise the
    same. The time of attention is known if lowtide's kernels run it.
    """

    def __init__(self, hook: LlamaHook, num_layers: int) -> None:
        self._library = native_library()
        array = ctypes.POINTER(ctypes.c_int64)
        self._library.lowtide_timer_start.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.lowtide_timer_start.restype = None
        self._library.lowtide_timer_read.argtypes = [ctypes.c_void_p, array, array, ctypes.c_int]
        self._library.lowtide_timer_read.restype = None
        self._clock = hook.clock
        self._ends = (ctypes.c_int64 * num_layers)()
        self._attention = (ctypes.c_int64 * num_layers)()

    def start(self, *, timed: bool) -> None:
        """Start before a pass; passes from now on are timed or not."""
        self._library.lowtide_timer_start(self._clock, timed)

    def read(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return when each layer of the timed pass ended, and its time in lowtide's attention.

        Both in nanoseconds, the first since `start`; 0 for a layer that has not run, or not natively.
        """
        self._library.lowtide_timer_read(self._clock, self._ends, self._attention, len(self._ends))
        return self._ends[:], self._attention[:]
