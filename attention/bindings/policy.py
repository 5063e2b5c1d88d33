"""AttentionKernels: the interface through which a policy configures lowtide's attention kernels.

The kernels run inside llama.cpp's graph (`llama_hook.LlamaHook`) or inside an ONNX graph
(`onnx_ops.OnnxAttention`); both hold one C++ policy object, and policies set it between forward passes.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from lowtide.attention.bindings.counts import KernelCounts, ScoreCost
from lowtide.attention.bindings.structs import (
    DeltaBlocksRule,
    DeltaRowsRule,
    ScoreCounts,
    ScoreRule,
    SelectionRule,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PromptScorer(Protocol):
    """Scores the keys of a prompt in one layer, for GemFilter; called between forward passes."""

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """End forward passes behind the attention of `layer`; the last pass of a prompt scores its keys.

        The logits of such a pass mean nothing.
        """

    def run_whole_passes(self) -> None:
        """Run forward passes through all layers again."""

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None if the last pass did not score them."""


class AttentionKernels(PromptScorer, ABC):
    """The kernels of one model; `policy` is the address of their C++ policy object.

    All methods are called between forward passes.
    """

    def __init__(self, library: ctypes.CDLL, policy: int) -> None:
        _declare(library)
        self._library, self._policy = library, policy
        self.blocks = BlockKernels(library, policy)

    @property
    @abstractmethod
    def kernels(self) -> str:
        """The name of the instruction set in use."""

    @property
    @abstractmethod
    def supports_bf16(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""

    @abstractmethod
    def counts(self) -> KernelCounts:
        """Return what the kernels have done so far."""

    def start_pass(self, *, sparse: bool, refresh: bool = True, use_bf16: bool = False) -> None:
        """Set how the next forward passes attend: to all keys, or to the selected keys if `sparse`.

        With `refresh` the selection layers select again. `use_bf16` multiplies the queries of a prompt in
        bfloat16; see `supports_bf16`. Ends attention to groups or merged blocks of keys.
        """
        self._library.lowtide_policy_start_pass(self._policy, sparse, refresh, use_bf16)

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set each layer's role in a sparse pass: a byte a layer, 0 dense, 1 select, 2 reuse."""
        if self._library.lowtide_policy_set_roles(
            self._policy, roles, len(roles), ctypes.byref(rule)
        ):
            raise MemoryError

    def set_groups(
        self,
        rule: DeltaRowsRule,
        num_groups: NDArray[np.uint8],
        score_bias: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set how whole keys are grouped.

        `num_groups` and `score_bias` (layers, kv_heads) are the groups of each page of 64 keys and the
        factor of their score correction, `scales` (layers, kv_heads, head_dim) the channels' weights in the
        distance of two keys. Raises `ValueError` if a page cannot have so many groups.
        """
        failed = self._library.lowtide_policy_set_delta_rows(
            self._policy,
            ctypes.byref(rule),
            num_groups.ctypes.data,
            score_bias.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if failed == 2:
            raise ValueError("a page cannot have so many groups")
        if failed:
            raise MemoryError

    def start_grouped(self, *, refine: bool = False) -> None:
        """Attend to groups of keys until the next `start_pass`.

        With `refine`, the keys of groups with much of a head's attention weight are read, see `DeltaRowsRule`.
        """
        self._library.lowtide_policy_start_delta_rows(self._policy, refine)

    def measure_groups(self) -> None:
        """Attend to every key and measure the error of the groups, until the next `start_pass`."""
        if self._library.lowtide_policy_measure_delta_rows(self._policy):
            raise MemoryError

    def group_measures(
        self, num_layers: int, num_kv_heads: int, head_dim: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what was measured since `measure_groups`.

        These are each KV head's relative squared error, (layers, kv_heads), negative for a layer that
        cannot be grouped, and the mean squares of its queries' channels, (layers, kv_heads, head_dim).
        """
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        squares = np.zeros((num_layers, num_kv_heads, head_dim), np.float32)
        self._library.lowtide_policy_read_delta_rows_errors(
            self._policy, errors.ctypes.data, squares.ctypes.data
        )
        return errors, squares

    def truncate(self, num_slots: int) -> None:
        """Drop what the policy derived from KV slots `num_slots` and later.

        Needed if something else than a forward pass changed them.
        """
        self._library.lowtide_policy_truncate(self._policy, num_slots)


class BlockKernels:
    """The part of `AttentionKernels` for delta by channel blocks; called between forward passes."""

    def __init__(self, library: ctypes.CDLL, policy: int) -> None:
        self._library, self._policy = library, policy
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.lowtide_policy_set_delta_blocks.argtypes = [pointer] * 5 + [number] * 3
        library.lowtide_policy_start_delta_blocks.argtypes = [pointer, number]
        library.lowtide_policy_start_delta_blocks.restype = None
        library.lowtide_policy_measure_delta_blocks.argtypes = [pointer]
        library.lowtide_policy_read_delta_blocks_errors.argtypes = [pointer] * 4
        library.lowtide_policy_read_delta_blocks_errors.restype = None
        library.lowtide_policy_score_counts.argtypes = [pointer]
        library.lowtide_policy_score_counts.restype = ScoreCounts

    def set_head_params(
        self,
        rule: DeltaBlocksRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set which blocks are stored.

        `thresholds` and `shares` are (layers, kv_heads): the distance up to which a block is merged, and
        the largest share of a page's blocks to store, 1 if the threshold decides alone; `scales` is
        (layers, kv_heads, head_dim). A layer with a threshold below 0 stays dense. Raises `ValueError` for
        an unsupported block size.
        """
        failed = self._library.lowtide_policy_set_delta_blocks(
            self._policy,
            ctypes.byref(rule),
            thresholds.ctypes.data,
            shares.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if failed == 2:
            raise ValueError(f"blocks cannot have {rule.block_size} channels")
        if failed:
            raise MemoryError

    def start(self, *, refine: bool = False) -> None:
        """Attend to merged key blocks until the next `start_pass`.

        With `refine`, keys with much of a head's attention weight are read exactly, see `DeltaBlocksRule`.
        """
        self._library.lowtide_policy_start_delta_blocks(self._policy, refine)

    def measure(self) -> None:
        """Attend to every key and measure the error of merging, until the next `start_pass`."""
        if self._library.lowtide_policy_measure_delta_blocks(self._policy):
            raise MemoryError

    def measures(
        self, num_layers: int, num_kv_heads: int, head_dim: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return what was measured since `measure`.

        These are each KV head's relative squared error and the share of its channels that was stored,
        (layers, kv_heads), and the mean squares of its queries' channels, (layers, kv_heads, head_dim).
        """
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        shares = np.zeros_like(errors)
        squares = np.zeros((num_layers, num_kv_heads, head_dim), np.float32)
        self._library.lowtide_policy_read_delta_blocks_errors(
            self._policy, errors.ctypes.data, squares.ctypes.data, shares.ctypes.data
        )
        return errors, shares, squares

    def cost(self) -> ScoreCost:
        """Return the cost of all scores over merged blocks so far."""
        counts = self._library.lowtide_policy_score_counts(self._policy)
        return ScoreCost(*(getattr(counts, name) for name, *_ in ScoreCounts._fields_))


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_policy_set_roles.argtypes = [pointer, ctypes.c_char_p, number, pointer]
    library.lowtide_policy_start_pass.argtypes = [pointer, number, number, number]
    library.lowtide_policy_start_pass.restype = None
    library.lowtide_policy_set_delta_rows.argtypes = [pointer] * 5 + [number] * 3
    library.lowtide_policy_start_delta_rows.argtypes = [pointer, ctypes.c_int]
    library.lowtide_policy_start_delta_rows.restype = None
    library.lowtide_policy_measure_delta_rows.argtypes = [pointer]
    library.lowtide_policy_read_delta_rows_errors.argtypes = [pointer] * 3
    library.lowtide_policy_read_delta_rows_errors.restype = None
    library.lowtide_policy_truncate.argtypes = [pointer, number]
    library.lowtide_policy_truncate.restype = None
