"""How a prompt's rows are multiplied under our kernels: exactly, or rounded to bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.models.errors import BadOption

if TYPE_CHECKING:
    from lowtide.attention.kernel_host import KernelHost

EXACT, BF16 = "exact", "bf16"
PROMPTS = (EXACT, BF16)


def check_prompts(prompts: str) -> None:
    """Raise `BadOption` for a value that there is not, or that this processor has no units for."""
    from lowtide.attention.native_library import cpu_features

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
