"""KernelHost: where our kernels run, in llama.cpp's graph or in an ONNX graph's session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowtide.attention.policy_states import PolicyStates
from lowtide.attention.prompt_scorer import PromptScorer
from lowtide.attention.selection_rule import SelectionRule

if TYPE_CHECKING:
    import ctypes

    import numpy as np
    from numpy.typing import NDArray

    from lowtide.attention.graph_hook import HookCounts


class KernelHost(PromptScorer, Protocol):
    """What policies set of it and ask of it, between passes."""

    @property
    def kernels(self) -> str:
        """The instruction set in use."""

    @property
    def can_round(self) -> bool:
        """Whether these kernels can multiply in bfloat16."""

    def set_roles(self, roles: bytes, rule: SelectionRule) -> None:
        """Set what each layer does in a sparse pass (`LayerRole`)."""

    def counts(self) -> HookCounts:
        """Return what our kernels have done so far."""

    def start_pass(self, *, sparse: bool, refresh: bool = True, rounded: bool = False) -> None:
        """Say whether the passes from now on are sparse, whether they choose anew, and are rounded."""

    def set_groups(
        self,
        rule: ctypes.Structure,
        num_groups: NDArray[np.uint8],
        lifts: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> None:
        """Set how keys are grouped (`DeltaRule`)."""

    def start_grouped(self, *, opens: bool = False) -> None:
        """Have passes attend to groups of keys, until a `start_pass`; `opens` has them look into those that
        get much of a head's weight, as the rule has it."""

    @property
    def least_cells(self) -> int:
        """The fewest cells, but for none, that the cache can go back to: groups replaced the rest."""

    @property
    def has_lost_keys(self) -> bool:
        """Whether a pass has wanted cells that groups had replaced."""

    @property
    def states(self) -> PolicyStates:
        """What has passes attend to states of keys."""
