"""Exact attention: llama.cpp's own kernels, or ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.attention.policy import AttentionPolicy, Steering
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.graph_hook import GraphHook


class Llama(AttentionPolicy):
    """llama.cpp's own kernels; nothing is hooked."""

    name = "llama"
    uses_hook = False


class Dense(AttentionPolicy):
    """Our exact kernels: a row's result depends neither on the batch it came in nor on the threads."""

    name = "dense"

    def install(self, hook: GraphHook, spec: ModelSpec) -> Steering:
        """Make every pass exact, whatever another policy left behind."""
        return DenseSteering(hook)


class DenseSteering(Steering):
    """Every pass is exact."""

    def __init__(self, hook: GraphHook) -> None:
        self._hook = hook

    def before_prompt(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False)

    def before_decode(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False)
