"""KernelHost: where our kernels run, in llama.cpp's graph or in an ONNX graph's session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowtide.attention.prompt_scorer import PromptScorer
from lowtide.attention.selection_rule import SelectionRule

if TYPE_CHECKING:
    from lowtide.attention.graph_hook import HookCounts


class KernelHost(PromptScorer, Protocol):
    """What dense, tidal and gem attention set of it, between passes."""

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
