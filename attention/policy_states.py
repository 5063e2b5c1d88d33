"""PolicyStates: attention over states where our kernels run, as `native/state_attend.h` has it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lowtide.attention.delta.state_kernels import ScoreCounts, StatesRule
from lowtide.attention.score_cost import ScoreCost

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PolicyStates:
    """That part of one host's `PolicyKernels`; alive as long as it. Everything is called between passes."""

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

    def set_units(
        self,
        rule: StatesRule,
        thresholds: NDArray[np.float32],
        shares: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set what is sent: thresholds and shares (layers, kv_heads), scales (layers, kv_heads, key_size).

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

    def start(self, *, opens: bool = False) -> None:
        """Have passes attend to states, until a `start_pass`; `opens` has them see keys themselves where a
        state gets much of a head's weight, as the rule has it."""
        self._library.lowtide_policy_start_states(self._attend, opens)

    def measure(self) -> None:
        """Have passes attend to every key and measure what states would lose, until a `start_pass`."""
        if self._library.lowtide_policy_measure_states(self._attend):
            raise MemoryError

    def measures(
        self, num_layers: int, num_kv_heads: int, key_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return what was measured since: each unit's relative squared error and the share of its channels
        that were sent, (layers, kv_heads), and the mean squares of its queries' channels, (layers,
        kv_heads, key_size)."""
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        shares = np.zeros_like(errors)
        squares = np.zeros((num_layers, num_kv_heads, key_size), np.float32)
        self._library.lowtide_policy_read_state_measures(
            self._attend, errors.ctypes.data, squares.ctypes.data, shares.ctypes.data
        )
        return errors, shares, squares

    def cost(self) -> ScoreCost:
        """Return what the scores of all passes over states have cost."""
        counts = self._library.lowtide_policy_score_counts(self._attend)
        return ScoreCost(*(getattr(counts, name) for name, *_ in ScoreCounts._fields_))
