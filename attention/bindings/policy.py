"""PolicyBindings: what attends as a policy has it, wherever our kernels run (`native/policy_attend.h`).

BlockBindings: attention over states where our kernels run, as `native/state_attend.h` has it.

AttentionKernels: where our kernels run, in llama.cpp's graph or in an ONNX graph's session.

ScoreCost: what scores cost where keys behind a window are states, and what that saved.

PromptScorer: where one layer scores a prompt, in llama.cpp's graph or an ONNX graph's session."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.attention.bindings.structs import ScoreCounts, ScoreRule, SelectionRule, StatesRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.attention.bindings.llama_hook import KernelCounts


@dataclass(frozen=True, slots=True)
class ScoreCost:
    """Sums over passes, for the last row of each, over all layers that saw states.

    A channel of a key is counted once, for all query heads that it is multiplied with: `channels_held` of
    all keys that were seen, `channels_behind` of those seen as states, of which `channels_sent` were sent;
    `channels_multiplied` is what was multiplied, of the window and of opened keys, too; what each key adds
    up, one product a block, is not counted. `key_bytes_held` are those keys in the cache,
    `key_bytes_read` what was read in their place, with which keys are alike.
    """

    channels_held: int = 0
    channels_behind: int = 0
    channels_sent: int = 0
    channels_multiplied: int = 0
    key_bytes_held: int = 0
    key_bytes_read: int = 0

    def __sub__(self, other: ScoreCost) -> ScoreCost:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return ScoreCost(*(mine - theirs for mine, theirs in pairs))

    @property
    def sparsity(self) -> float:
        """The share of multiplications skipped behind the window: DeltaLLM's definition."""
        return 1 - self.channels_sent / self.channels_behind if self.channels_behind else 0.0

    @property
    def skipped(self) -> float:
        """The share of all multiplications of scores that was skipped."""
        return 1 - self.channels_multiplied / self.channels_held if self.channels_held else 0.0

    @property
    def key_bytes_skipped(self) -> int:
        """Bytes of keys that were not read; below 0 where of single channels little is skipped."""
        return self.key_bytes_held - self.key_bytes_read

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "sparsity": round(self.sparsity, 4),
            "skipped": round(self.skipped, 4),
            "key_bytes_held": self.key_bytes_held,
            "key_bytes_read": self.key_bytes_read,
        }

    def __str__(self) -> str:
        behind = f"{self.sparsity:.0%} behind the window"
        return f"{self.skipped:.0%} of the score multiplications skipped ({behind})"


NO_COST = ScoreCost()


class BlockBindings:
    """That part of one host's `PolicyBindings`; alive as long as it. Everything is called between passes."""

    def __init__(self, library: ctypes.CDLL, attend: int) -> None:
        self._library, self._attend = library, attend
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.lowtide_policy_set_states.argtypes = [pointer] * 5 + [number] * 3
        library.lowtide_policy_start_states.argtypes = [pointer, number]
        library.lowtide_policy_start_states.restype = None
        library.lowtide_policy_measure_states.argtypes = [pointer]
        library.lowtide_policy_read_state_measures.argtypes = [pointer] * 4
        library.lowtide_policy_read_state_measures.restype = None
        library.lowtide_policy_score_counts.argtypes = [pointer]
        library.lowtide_policy_score_counts.restype = ScoreCounts

    def set_head_params(
        self,
        rule: StatesRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set what is sent: thresholds and shares (layers, kv_heads), scales (layers, kv_heads, head_dim).

        See `StatesLayer`; a layer with a threshold below 0 keeps its attention dense. Raises `ValueError`
        where blocks cannot be of that size.
        """
        failed = self._library.lowtide_policy_set_states(
            self._attend,
            ctypes.byref(rule),
            thresholds.ctypes.data,
            shares.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if failed == 2:
            raise ValueError(f"blocks cannot be of {rule.block} channels")
        if failed:
            raise MemoryError

    def start(self, *, refine: bool = False) -> None:
        """Have passes attend to states, until a `start_pass`; `refine` has them see keys themselves where a
        state gets much of a head's weight, as the rule has it."""
        self._library.lowtide_policy_start_states(self._attend, refine)

    def measure(self) -> None:
        """Have passes attend to every key and measure what states would lose, until a `start_pass`."""
        if self._library.lowtide_policy_measure_states(self._attend):
            raise MemoryError

    def measures(
        self, num_layers: int, num_kv_heads: int, head_dim: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return what was measured since: each unit's relative squared error and the share of its channels
        that were sent, (layers, kv_heads), and the mean squares of its queries' channels, (layers,
        kv_heads, head_dim)."""
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        shares = np.zeros_like(errors)
        squares = np.zeros((num_layers, num_kv_heads, head_dim), np.float32)
        self._library.lowtide_policy_read_state_measures(
            self._attend, errors.ctypes.data, squares.ctypes.data, shares.ctypes.data
        )
        return errors, shares, squares

    def cost(self) -> ScoreCost:
        """Return what the scores of all passes over states have cost."""
        counts = self._library.lowtide_policy_score_counts(self._attend)
        return ScoreCost(*(getattr(counts, name) for name, *_ in ScoreCounts._fields_))


class PolicyBindings:
    """That part of one host, which `attend` belongs to: policies set it, between passes."""

    def __init__(self, library: ctypes.CDLL, attend: int) -> None:
        _declare(library)
        self._library, self._policy = library, attend
        self.states = BlockBindings(library, attend)

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set what each layer does in a sparse pass (`LayerRole`)."""
        if self._library.lowtide_policy_set_roles(
            self._policy, roles, len(roles), ctypes.byref(rule)
        ):
            raise MemoryError

    def start_pass(self, *, sparse: bool, refresh: bool = True, use_bf16: bool = False) -> None:
        """Say whether the passes from now on are sparse, and whether they choose their keys anew.

        `use_bf16` has a prompt's rows multiplied in bfloat16, where `supports_bf16`.
        """
        self._library.lowtide_policy_start_pass(self._policy, sparse, refresh, use_bf16)

    def set_groups(
        self,
        rule: ctypes.Structure,
        num_groups: NDArray[np.uint8],
        score_bias: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set how keys are grouped (`DeltaRule`): groups of a page and their lifts, (layers, kv_heads), and
        scales, (layers, kv_heads, head_dim).

        Raises `ValueError` where a page of keys cannot have so many groups.
        """
        failed = self._library.lowtide_policy_set_groups(
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
        """Have passes attend to groups, and with `refine` to some groups' keys, until a `start_pass`."""
        self._library.lowtide_policy_start_grouped(self._policy, refine)

    def measure_groups(self) -> None:
        """Have passes attend to every key and measure what groups would lose, until a `start_pass`."""
        if self._library.lowtide_policy_measure_groups(self._policy):
            raise MemoryError

    def group_measures(
        self, num_layers: int, num_kv_heads: int, head_dim: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return each unit's relative squared error, (layers, kv_heads), and the mean squares of its
        queries' channels, (layers, kv_heads, head_dim), since they are measured."""
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        squares = np.zeros((num_layers, num_kv_heads, head_dim), np.float32)
        self._library.lowtide_policy_read_group_measures(
            self._policy, errors.ctypes.data, squares.ctypes.data
        )
        return errors, squares

    def cut(self, num_cells: int) -> None:
        """Forget what is known of the cache's cells from `num_cells` on: other than passes changed them."""
        self._library.lowtide_policy_cut(self._policy, num_cells)

    @property
    def min_tokens(self) -> int:
        """The fewest cells, but for none, that the cache can go back to: groups replaced the rest."""
        return int(self._library.lowtide_policy_least_cells(self._policy))

    @property
    def has_lost_keys(self) -> bool:
        """Whether a pass has wanted cells that groups had replaced: what it computed means nothing."""
        return bool(self._library.lowtide_policy_has_lost(self._policy))


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lowtide_policy_set_roles.argtypes = [pointer, ctypes.c_char_p, number, pointer]
    library.lowtide_policy_start_pass.argtypes = [pointer, number, number, number]
    library.lowtide_policy_start_pass.restype = None
    library.lowtide_policy_set_groups.argtypes = [pointer] * 5 + [number] * 3
    library.lowtide_policy_start_grouped.argtypes = [pointer, ctypes.c_int]
    library.lowtide_policy_start_grouped.restype = None
    library.lowtide_policy_measure_groups.argtypes = [pointer]
    library.lowtide_policy_read_group_measures.argtypes = [pointer] * 3
    library.lowtide_policy_read_group_measures.restype = None
    library.lowtide_policy_cut.argtypes = [pointer, number]
    library.lowtide_policy_cut.restype = None
    library.lowtide_policy_least_cells.argtypes = [pointer]
    library.lowtide_policy_has_lost.argtypes = [pointer]


class PromptScorer(Protocol):
    """What GemFilter's first pass sets of it, between passes."""

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """Have passes from now on end behind the attention of `layer`; the last one scores every key there.

        What such a pass returns as logits means nothing.
        """

    def run_whole_passes(self) -> None:
        """Have passes go through all layers again."""

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None where the last pass did not make them."""


class AttentionKernels(PromptScorer, Protocol):
    """What policies set of it and ask of it, between passes."""

    @property
    def kernels(self) -> str:
        """The instruction set in use."""

    @property
    def supports_bf16(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set what each layer does in a sparse pass (`LayerRole`)."""

    def counts(self) -> KernelCounts:
        """Return what our kernels have done so far."""

    def start_pass(self, *, sparse: bool, refresh: bool = True, use_bf16: bool = False) -> None:
        """Say whether the passes from now on are sparse, whether they choose anew, and are rounded."""

    def set_groups(
        self,
        rule: ctypes.Structure,
        num_groups: NDArray[np.uint8],
        score_bias: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set how keys are grouped (`DeltaRule`)."""

    def start_grouped(self, *, refine: bool = False) -> None:
        """Have passes attend to groups of keys, until a `start_pass`; `refine` has them look into those that
        get much of a head's weight, as the rule has it."""

    @property
    def min_tokens(self) -> int:
        """The fewest cells, but for none, that the cache can go back to: groups replaced the rest."""

    @property
    def has_lost_keys(self) -> bool:
        """Whether a pass has wanted cells that groups had replaced."""

    @property
    def states(self) -> BlockBindings:
        """What has passes attend to states of keys."""
