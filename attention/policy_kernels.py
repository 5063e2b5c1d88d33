"""PolicyKernels: what attends as a policy has it, wherever our kernels run (`native/policy_attend.h`)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lowtide.attention.policy_states import PolicyStates
from lowtide.attention.selection_rule import SelectionRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PolicyKernels:
    """That part of one host, which `attend` belongs to: policies set it, between passes."""

    def __init__(self, library: ctypes.CDLL, attend: int) -> None:
        _declare(library)
        self._library, self._policy = library, attend
        self.states = PolicyStates(library, attend)

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set what each layer does in a sparse pass (`LayerRole`)."""
        if self._library.lowtide_policy_set_roles(
            self._policy, roles, len(roles), ctypes.byref(rule)
        ):
            raise MemoryError

    def start_pass(self, *, sparse: bool, refresh: bool = True, rounded: bool = False) -> None:
        """Say whether the passes from now on are sparse, and whether they choose their keys anew.

        `rounded` has a prompt's rows multiplied in bfloat16, where `can_round`.
        """
        self._library.lowtide_policy_start_pass(self._policy, sparse, refresh, rounded)

    def set_groups(
        self,
        rule: ctypes.Structure,
        num_groups: NDArray[np.uint8],
        lifts: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set how keys are grouped (`DeltaRule`): groups of a page and their lifts, (layers, kv_heads), and
        scales, (layers, kv_heads, key_size).

        Raises `ValueError` where a page of keys cannot have so many groups.
        """
        failed = self._library.lowtide_policy_set_groups(
            self._policy,
            ctypes.byref(rule),
            num_groups.ctypes.data,
            lifts.ctypes.data,
            scales.ctypes.data,
            *scales.shape,
        )
        if failed == 2:
            raise ValueError("a page cannot have so many groups")
        if failed:
            raise MemoryError

    def start_grouped(self, *, opens: bool = False) -> None:
        """Have passes attend to groups, and with `opens` to some groups' keys, until a `start_pass`."""
        self._library.lowtide_policy_start_grouped(self._policy, opens)

    def measure_groups(self) -> None:
        """Have passes attend to every key and measure what groups would lose, until a `start_pass`."""
        if self._library.lowtide_policy_measure_groups(self._policy):
            raise MemoryError

    def group_measures(
        self, num_layers: int, num_kv_heads: int, key_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return each unit's relative squared error, (layers, kv_heads), and the mean squares of its
        queries' channels, (layers, kv_heads, key_size), since they are measured."""
        import numpy as np

        errors = np.zeros((num_layers, num_kv_heads), np.float32)
        squares = np.zeros((num_layers, num_kv_heads, key_size), np.float32)
        self._library.lowtide_policy_read_group_measures(
            self._policy, errors.ctypes.data, squares.ctypes.data
        )
        return errors, squares

    def cut(self, num_cells: int) -> None:
        """Forget what is known of the cache's cells from `num_cells` on: other than passes changed them."""
        self._library.lowtide_policy_cut(self._policy, num_cells)

    @property
    def least_cells(self) -> int:
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
