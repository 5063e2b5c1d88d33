"""GraphHook: our attention kernels inside llama.cpp's own graph.

llama.cpp asks an evaluation callback about every node of a graph before computing it; the callback is
C++ (`native/graph_hook.cpp`) and swaps each attention node for our kernel, which then runs in
llama.cpp's thread pool. Works on an unmodified llama-cpp-python; what is not as we know it is left to
llama.cpp and counted. Knows no policy and no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.hook_functions import declare_hook, ggml_functions
from lowtide.attention.native_library import native_library
from lowtide.attention.policy_kernels import PolicyKernels
from lowtide.attention.prompt_scores import ScoreRule
from lowtide.attention.score_cost import NO_COST, ScoreCost
from lowtide.attention.weight_stream import NativeSpan
from lowtide.models.errors import LowtideError
from lowtide.models.sequences import PartCells

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REASON_BYTES = 256


@dataclass(frozen=True, slots=True)
class HookCounts:
    """What a hook has done since it was made.

    `layers_ours` run our kernel in every pass, `layers_theirs` were left to llama.cpp in at least one;
    `seconds` is the time in our kernel. Of the `keys_held` that a pass's last row could see, over
    all layers and passes, `keys_read` were attended to. `weight_bytes_given_back` counts mapped weights
    whose pages went back to the system, `products_sliced` the products that gave theirs back on the way,
    `products_packed` those that were computed from packed weights, `packed_refused` the nodes that read
    such weights in a way that is not known. `scores` is what they cost where keys were states.
    """

    layers_ours: int
    layers_theirs: int
    nodes_ours: int
    nodes_theirs: int
    seconds: float
    scratch_bytes: int
    keys_read: int
    keys_held: int
    weight_bytes_given_back: int
    products_sliced: int
    products_packed: int
    packed_refused: int
    scores: ScoreCost = NO_COST


class GraphHook(PolicyKernels):
    """One hook for one llama.cpp context of `threads` threads; keep it as long as the context lives.

    `kernels` names an instruction set (see `lowtide.attention.kernels`); None takes the best. Raises
    `LowtideError` where this llama.cpp cannot be hooked, with the reason.
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

    def counts(self) -> HookCounts:
        """Return what the hook has done so far."""
        counts = self._library.lowtide_hook_counts(self._hook)
        return HookCounts(
            counts.layers_ours,
            counts.layers_theirs,
            counts.nodes_ours,
            counts.nodes_theirs,
            counts.nanoseconds / 1e9,
            counts.scratch_bytes,
            counts.keys_read,
            counts.keys_held,
            counts.weight_bytes_given_back,
            counts.products_sliced,
            counts.products_packed,
            counts.packed_refused,
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

    def read_packed(self, names: Sequence[str], max_rows: int, max_columns: int) -> None:
        """Have tensors of these names read as packed ones, in passes of `max_rows` rows at most.

        `max_columns` is the most that one of them has. Raises `MemoryError`.
        """
        text = "\n".join(names).encode()
        if self._library.lowtide_hook_read_packed(self._hook, text, max_rows, max_columns):
            raise MemoryError

    @property
    def can_round(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""
        return bool(self._library.lowtide_hook_can_round(self._hook))

    def set_parts(self, cells: PartCells | None) -> None:
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
    def parts_refused(self) -> int:
        """How many masks showed other cells than `set_parts` was told: those passes took every cell."""
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
