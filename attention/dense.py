"""Exact attention: llama.cpp's own kernels, or ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lowtide.attention.policy import AttentionPolicy, Steering
from lowtide.attention.prompts import EXACT, check_hook, check_prompts
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.kernel_host import KernelHost


class Llama(AttentionPolicy):
    """llama.cpp's own kernels; nothing is hooked."""

    name = "llama"
    uses_hook = False
    takes_batches = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(AttentionPolicy):
    """Our exact kernels: a row's result depends neither on the batch it came in nor on the threads.

    With `prompts` "bf16" the rows of a prompt are multiplied in bfloat16, where the processor has units
    for it: faster, and no longer exact.
    """

    name: ClassVar[str] = "dense"
    takes_batches: ClassVar[bool] = True

    prompts: str = EXACT

    def fitted(self, spec: ModelSpec) -> Dense:
        """Check that this processor can."""
        check_prompts(self.prompts)
        return self

    def install(self, hook: KernelHost, spec: ModelSpec) -> Steering:
        """Attend fully in every pass, whatever another policy left behind."""
        check_hook(hook, self.prompts)
        return DenseSteering(hook, self.prompts)

    def __str__(self) -> str:
        return "dense" if self.prompts == EXACT else f"dense, prompts in {self.prompts}"


class DenseSteering(Steering):
    """Every pass attends to every key."""

    def __init__(self, hook: KernelHost, prompts: str = EXACT) -> None:
        self._hook = hook
        self.exact_prompts = prompts == EXACT

    def before_prompt(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False, rounded=not self.exact_prompts)

    def before_decode(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False)
