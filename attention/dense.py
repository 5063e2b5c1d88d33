"""Exact attention: llama.cpp's own kernels, or ours.

How a prompt's rows are multiplied under our kernels: exactly, or rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lowtide.attention.policy import AttentionPolicy, Steering
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.bindings.policy import KernelHost


EXACT, BF16 = "exact", "bf16"
PROMPTS = (EXACT, BF16)


def check_prompts(prompts: str) -> None:
    """Raise `BadOption` for a value that there is not, or that this processor has no units for."""
    from lowtide.attention.bindings.library import cpu_features

    if prompts not in PROMPTS:
        raise BadOption(f"prompts is {prompts!r}, one of {', '.join(PROMPTS)} is wanted")
    if prompts == BF16 and "avx512_bf16" not in cpu_features():
        raise BadOption(
            "prompts is 'bf16', and this processor has no avx512_bf16: leave prompts out"
        )


def check_hook(hook: KernelHost, prompts: str) -> None:
    """Raise `BadOption` where the hook's kernels have no units for it."""
    if prompts == BF16 and not hook.can_round:
        raise BadOption(
            f"prompts is 'bf16', and the {hook.kernels} kernels multiply exactly: leave prompts out"
        )


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
