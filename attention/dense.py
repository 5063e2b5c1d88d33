"""Exact attention: with llama.cpp's kernels, or with lowtide's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowtide.attention.bindings.library import cpu_features
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.policy import AttentionPolicy, PassController, Setting
from lowtide.models.arguments.values import choice
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

EXACT, BF16 = "exact", "bf16"
PROMPTS = (EXACT, BF16)
PROMPTS_SETTING = Setting("prompts", str)


def check_prompts(prompts: str) -> None:
    """Raise `BadOption` for a value that this processor does not support."""
    if prompts == BF16 and "avx512_bf16" not in cpu_features():
        raise BadOption(
            "prompts is 'bf16' and this processor does not have avx512_bf16: leave prompts out"
        )


def check_kernels(kernels: AttentionKernels, prompts: str) -> None:
    """Raise `BadOption` if the kernels in use cannot multiply in bfloat16."""
    if prompts == BF16 and not kernels.supports_bf16:
        raise BadOption(
            f"prompts is 'bf16' and the {kernels.kernels} kernels do not support it: leave prompts out"
        )


class Llama(AttentionPolicy):
    """llama.cpp's own attention kernels."""

    name = "llama"
    uses_native_kernels = False
    supports_batch = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(AttentionPolicy):
    """Exact attention with lowtide's kernels; batch-invariant: a token's result depends neither on the
    batch it is computed in nor on the number of threads.

    `prompts` "bf16" multiplies the queries of a prompt in bfloat16, if the processor can: faster, and not
    exact.
    """

    name: ClassVar[str] = "dense"
    settings: ClassVar[tuple[Setting, ...]] = (PROMPTS_SETTING,)
    supports_batch: ClassVar[bool] = True
    can_follow_filter: ClassVar[bool] = True

    prompts: str = EXACT

    def __post_init__(self) -> None:
        choice("dense's prompts", self.prompts, PROMPTS)

    def resolve(self, spec: ModelSpec) -> Dense:
        """Check that the processor supports `prompts`."""
        check_prompts(self.prompts)
        return self

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Attend to every key in every pass."""
        check_kernels(kernels, self.prompts)
        return DenseController(kernels, self.prompts)

    def describe(self) -> str:
        """Name the policy, and bf16 if it is used."""
        return "dense" if self.prompts == EXACT else f"dense, prompts in {self.prompts}"


class DenseController(PassController):
    """Attends to every key in every pass."""

    def __init__(self, kernels: AttentionKernels, prompts: str = EXACT) -> None:
        self._kernels = kernels
        self.exact_prefill = prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend to every key, in bfloat16 if so set."""
        self._kernels.start_pass(sparse=False, use_bf16=not self.exact_prefill)

    def begin_decode(self) -> None:
        """Attend to every key, exactly."""
        self._kernels.start_pass(sparse=False)
