"""An attention policy of your own: read only the first tokens and a window of the last ones.

This is StreamingLLM's rule (Xiao et al., arXiv 2309.17453). Layer 0 reads every key and selects for the
other layers; its selection has no room for more than the sinks and the window.

Run it: python examples/own_policy.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowtide import Runtime
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import SelectionRule
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.attention.tidal.policy import ROLE_REUSE, ROLE_SELECT, TidalMemory
from lowtide.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(AttentionPolicy):
    """While decoding, read the first `sinks` and the last `recent` keys."""

    name: ClassVar[str] = "window"
    sinks: int = 4
    recent: int = 60

    @property
    def memory(self) -> TidalMemory:
        """The scores and the selection of one layer: a line of the memory plan."""
        return TidalMemory(selection_layers=1)

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Set what each layer does, and return what prepares each forward pass."""
        rule = SelectionRule(self.sinks + self.recent, 0.0, self.sinks, self.recent, 0)
        kernels.set_roles(bytes([ROLE_SELECT, *[ROLE_REUSE] * (spec.num_layers - 1)]), rule)
        return WindowController(kernels)


@dataclass
class WindowController(PassController):
    """Prompts are read densely, decoded tokens with the window."""

    kernels: AttentionKernels

    def begin_prefill(self) -> None:
        """Attend to every key."""
        self.kernels.start_pass(sparse=False)

    def begin_decode(self) -> None:
        """Attend to the sinks and the window."""
        self.kernels.start_pass(sparse=True)


if __name__ == "__main__":
    with Runtime.open(memory="400MiB", context=1024, attention=Window(recent=100)) as runtime:
        result = runtime.generate("The tide goes out. " * 40, max_tokens=16, temperature=0)
    print(f"{result.text}\nread {result.stats.attended_share:.0%} of the cached keys")
