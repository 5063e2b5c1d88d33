"""Exact attention: llama.cpp's own kernels, or ours.

How a prompt's rows are multiplied under our kernels: exactly, or rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.bindings.policy import AttentionKernels


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


def check_kernels(hook: AttentionKernels, prompts: str) -> None:
    """Raise `BadOption` where the hook's kernels have no units for it."""
    if prompts == BF16 and not hook.supports_bf16:
        raise BadOption(
            f"prompts is 'bf16', and the {hook.kernels} kernels multiply exactly: leave prompts out"
        )


class Llama(AttentionPolicy):
    """llama.cpp's own kernels; nothing is hooked."""

    name = "llama"
    uses_native_kernels = False
    supports_batch = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(AttentionPolicy):
    """Our exact kernels: a row's result depends neither on the batch it came in nor on the threads.

    With `prompts` "bf16" the rows of a prompt are multiplied in bfloat16, where the processor has units
    for it: faster, and no longer exact.
    """

    name: ClassVar[str] = "dense"
    supports_batch: ClassVar[bool] = True

    prompts: str = EXACT

    def resolve(self, spec: ModelSpec) -> Dense:
        """Check that this processor can."""
        check_prompts(self.prompts)
        return self

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Attend fully in every pass, whatever another policy left behind."""
        check_kernels(hook, self.prompts)
        return DenseController(hook, self.prompts)

    def __str__(self) -> str:
        return "dense" if self.prompts == EXACT else f"dense, prompts in {self.prompts}"


class DenseController(PassController):
    """Every pass attends to every key."""

    def __init__(self, hook: AttentionKernels, prompts: str = EXACT) -> None:
        self._hook = hook
        self.exact_prefill = prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False, use_bf16=not self.exact_prefill)

    def begin_decode(self) -> None:
        """Attend fully."""
        self._hook.start_pass(sparse=False)
