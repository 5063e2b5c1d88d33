"""LlamaHook: our attention kernels inside llama.cpp's own graph.

llama.cpp asks an evaluation callback about every node of a graph before computing it; the callback is
C++ (`native/llama_hook.cpp`) and swaps each attention node for our kernel, which then runs in
llama.cpp's thread pool. Works on an unmodified llama-cpp-python; what is not as we know it is left to
llama.cpp and counted. Knows no policy and no model.

The graph hook's C functions and structs, as `native/llama_hook.h` declares them.

LayerClock: how long each layer of a forward pass takes. Knows no policy and no model.

Weights that are read again for every pass: where they lie in memory, told to the graph hook.

Only the order of reading and the kernel's page cache are relied on: a page that was given back is read from
the file again when a node wants it, so the results are the same bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.bindings.library import native_library
from lowtide.attention.bindings.policy import NO_COST, PolicyBindings, ScoreCost
from lowtide.attention.bindings.structs import ScoreRule
from lowtide.memory.os import pages
from lowtide.memory.os.file_mappings import FileMap
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
            "keys_held weight_bytes_evicted matmuls_streamed matmuls_repacked repacked_refused".split()
        )
    ]


def ggml_functions() -> _GgmlFunctions:
    """Return the addresses of what the hook calls of ggml."""
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
    library.lowtide_hook_counts.argtypes = [pointer]
    library.lowtide_hook_counts.restype = _Counts
    library.lowtide_hook_kernels.argtypes = [pointer]
    library.lowtide_hook_kernels.restype = ctypes.c_char_p
    library.lowtide_hook_clock.argtypes = [pointer]
    library.lowtide_hook_clock.restype = pointer
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
    library.lowtide_hook_set_parts.argtypes = [
        pointer,
        ctypes.c_int,
        ctypes.c_int,
        pointer,
        pointer,
        pointer,
    ]
    library.lowtide_hook_parts_refused.argtypes = [pointer]
    library.lowtide_hook_parts_refused.restype = ctypes.c_int64
    library.lowtide_hook_copy_cell.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.lowtide_hook_read_packed.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.lowtide_hook_prompt_scores.argtypes = [pointer, pointer, ctypes.c_int]
    library.lowtide_hook_can_round.argtypes = [pointer]


BLOCK_BYTES = 64 << 10
"""Weights that are read in parts (rows of an embedding, slices of the output's matrix) are kept apart in
blocks of so many bytes: no smaller ones, since this is what Linux maps at once (fault-around)."""


class NativeSpan(ctypes.Structure):
    """The C++ `WeightSpan`, field for field."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in "begin end page_begin page_end".split()),
        ("group", ctypes.c_int32),
    ]


def mapped_spans(spec: ModelSpec, maps: Sequence[Collection[FileMap]]) -> list[NativeSpan]:
    """Return where each group of the model's weights lies, in order of address.

    `maps` has one entry for each of the model's files. Raises `LowtideError` where a weight is in no map.
    """
    spans = [
        native
        for group, weights in enumerate(spec.weight_groups)
        for span in weights.spans
        for native in _in_memory(span, maps[span.part], group)
    ]
    found = sum(span.end - span.begin for span in spans)
    wanted = sum(group.num_bytes for group in spec.weight_groups)
    if found != wanted:
        raise LowtideError(
            f"{wanted - found} bytes of {spec.name}'s weights are in no map of its file, so they cannot be "
            "given back between passes: raise --memory so that the weights stay resident"
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
    """Add the pages that it lies on, as far as they are whole pages of this file."""
    map_end = file_map.address + pages.round_down(file_map.num_bytes)
    return NativeSpan(begin, end, pages.round_down(begin), min(pages.round_up(end), map_end), group)


def isolate_spans(spec: ModelSpec, spans: Sequence[NativeSpan], maps: Iterable[FileMap]) -> None:
    """Have no span's pages come with those of another: what was given back would come back with it.

    Neither do those of distant parts of a weight outside of the layers. Raises `LowtideError` where the
    system allows no more areas of memory.
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
                f"{len(cuts)} areas of memory are wanted for {spec.name}'s weights, and the system allows "
                "no more: raise vm.max_map_count, or --memory so that the weights stay resident"
            )


def _cuts(span: NativeSpan, in_blocks: bool) -> Iterator[int]:
    """The page that a span shares with its neighbour is an area of its own."""
    first, last = pages.round_up(span.begin), pages.round_down(span.end)
    yield from (pages.round_down(span.begin), first, last, pages.round_up(span.end))
    if in_blocks:
        yield from range(-(-first // BLOCK_BYTES) * BLOCK_BYTES, last, BLOCK_BYTES)


REASON_BYTES = 256


@dataclass(frozen=True, slots=True)
class KernelCounts:
    """What a hook has done since it was made.

    `layers_native` run our kernel in every pass, `layers_fallback` were left to llama.cpp in at least one;
    `seconds` is the time in our kernel. Of the `keys_held` that a pass's last row could see, over
    all layers and passes, `keys_read` were attended to. `weight_bytes_evicted` counts mapped weights
    whose pages went back to the system, `matmuls_streamed` the products that gave theirs back on the way,
    `matmuls_repacked` those that were computed from packed weights, `repacked_refused` the nodes that read
    such weights in a way that is not known. `scores` is what they cost where keys were states.
    """

    layers_native: int
    layers_fallback: int
    nodes_native: int
    nodes_fallback: int
    seconds: float
    scratch_bytes: int
    keys_read: int
    keys_held: int
    weight_bytes_evicted: int
    matmuls_streamed: int
    matmuls_repacked: int
    repacked_refused: int
    scores: ScoreCost = NO_COST


class LlamaHook(PolicyBindings):
    """One hook for one llama.cpp context of `threads` threads; keep it as long as the context lives.

    `kernels` names an instruction set (see `structs.py`); None takes the best. Raises `LowtideError` where
    this llama.cpp cannot be hooked, with the reason.
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
                f"our attention cannot run in this llama.cpp ({reason.value.decode()}): use "
                "--attention llama, or another version of llama-cpp-python"
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
        address: int = self._library.lowtide_hook_clock(self._hook)
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
            counts.keys_held,
            counts.weight_bytes_evicted,
            counts.matmuls_streamed,
            counts.matmuls_repacked,
            counts.repacked_refused,
            self.states.cost(),
        )

    def set_active(self, active: bool) -> None:
        """Let attention be ours from the next pass on, or llama.cpp's again."""
        self._library.lowtide_hook_set_active(self._hook, active)

    def stream_weights(self, spans: Sequence[NativeSpan], kept: bytes) -> None:
        """Have the weights of the groups without a flag in `kept` given back once they were read.

        `spans` are in order of address; call it between passes.
        """
        array = (NativeSpan * len(spans))(*spans)
        failed = self._library.lowtide_hook_stream_weights(
            self._hook, array, len(spans), kept, len(kept)
        )
        if failed == 2:
            raise ValueError("spans are not in order, or of a group without a flag")
        if failed:
            raise MemoryError

    def read_repacked(self, names: Sequence[str], batch_size: int, max_columns: int) -> None:
        """Have tensors of these names read as packed ones, in passes of `batch_size` rows at most.

        `max_columns` is the most that one of them has. Raises `MemoryError`.
        """
        text = "\n".join(names).encode()
        if self._library.lowtide_hook_read_packed(self._hook, text, batch_size, max_columns):
            raise MemoryError

    @property
    def supports_bf16(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""
        return bool(self._library.lowtide_hook_can_round(self._hook))

    def set_batch_layout(self, cells: SequenceSlots | None) -> None:
        """Have the next pass attend to several sequences, each over its own cells; None: to one again."""
        if cells is None:
            failed = self._library.lowtide_hook_set_parts(self._hook, 0, 0, None, None, None)
        else:
            num = len(cells.num_rows)
            failed = self._library.lowtide_hook_set_parts(
                self._hook,
                cells.num_shared,
                num,
                (ctypes.c_int32 * num)(*cells.num_rows),
                (ctypes.c_void_p * num)(*(own.buffer_info()[0] for own in cells.own)),
                (ctypes.c_int32 * num)(*map(len, cells.own)),
            )
        if failed:
            raise MemoryError

    @property
    def layouts_refused(self) -> int:
        """How many masks showed other cells than `set_batch_layout` was told: those passes took every cell."""
        return int(self._library.lowtide_hook_parts_refused(self._hook))

    def copy_cell(self, source: int, target: int) -> int:
        """Copy a cell's keys and values over another's; return in how many layers.

        That is in those which attended to the last parts; none where that pass saw no such cells.
        """
        return int(self._library.lowtide_hook_copy_cell(self._hook, source, target))

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """Have passes from now on end behind the attention of `layer`; the last one scores every key there.

        What such a pass returns as logits means nothing.
        """
        self._library.lowtide_hook_score_prompt(self._hook, layer, ctypes.byref(rule), is_last)

    def run_whole_passes(self) -> None:
        """Have passes go through all layers again."""
        self._library.lowtide_hook_score_prompt(self._hook, -1, None, False)

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None where the last pass did not make them."""
        import numpy as np

        scores = np.empty(num_keys, np.float32)
        num_made = self._library.lowtide_hook_prompt_scores(
            self._hook, scores.ctypes.data, num_keys
        )
        return scores if num_made >= num_keys else None

    def close(self) -> None:
        """Free the hook; its context must be gone."""
        if self._hook:
            self._library.lowtide_hook_free(self._hook)
            self._hook = None


class LayerClock:
    """Takes the time of passes through a hook's graph; the hook must outlive it.

    A timed pass stops once a layer, behind the norm that begins the next one. Results stay bit for bit
    what they are. Attention's time is known where our kernels run.
    """

    def __init__(self, hook: LlamaHook, num_layers: int) -> None:
        self._library = native_library()
        array = ctypes.POINTER(ctypes.c_int64)
        self._library.lowtide_clock_start.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.lowtide_clock_start.restype = None
        self._library.lowtide_clock_read.argtypes = [ctypes.c_void_p, array, array, ctypes.c_int]
        self._library.lowtide_clock_read.restype = None
        self._clock = hook.clock
        self._ends = (ctypes.c_int64 * num_layers)()
        self._attention = (ctypes.c_int64 * num_layers)()

    def start(self, *, timed: bool) -> None:
        """Begin before a pass; passes from now on are timed or not."""
        self._library.lowtide_clock_start(self._clock, timed)

    def read(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return, of the pass that was timed, when each layer ended and its time in our attention.

        Both in nanoseconds, the first since `start`; 0 where a layer has not run, or not ours.
        """
        self._library.lowtide_clock_read(self._clock, self._ends, self._attention, len(self._ends))
        return self._ends[:], self._attention[:]
