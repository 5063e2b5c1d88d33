"""Backend: everything that an inference engine brings of its own.

`GgufBackend` (llama.cpp), `OnnxBackend` (onnxruntime) and `UserBackend` (a `Model` object of the caller's)
implement it. The planner calls `resolve` and `measure`, the engine calls `repack` and `load`; nobody else asks
which kind of model it is. `ResolvedModel` is what passes from the one to the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from lowtide.attention.bindings.library import usable_kernel_sets
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.bindings.matmul import matmul_kernels
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.machine import Machine
from lowtide.memory.plan.attention import FilterPrefill
from lowtide.memory.plan.driver import ESTIMATED, DriverMemory
from lowtide.memory.plan.estimates import ContextSizes, template_bytes, tokenising_bytes
from lowtide.memory.plan.gpu import GpuBudget
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.planner import require_fit
from lowtide.memory.plan.speculation.choices import SpeculationConfig
from lowtide.memory.process import read_process_memory
from lowtide.memory.reclaim import Reclaimer
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.names import option
from lowtide.models.errors import UnsupportedModel
from lowtide.models.gguf.embedding import GgufEmbedder
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec
from lowtide.models.template.families import template_of
from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.kernels.kernel_choice import KernelChoice
from lowtide.runtime.backends.quality_choice import QualityChoice
from lowtide.runtime.backends.threads import ThreadChooser
from lowtide.runtime.errors import CannotRepack
from lowtide.runtime.profiling.profiler import Profiler


class PlannedPrompt(Protocol):
    """A prompt that is held while the model is planned."""

    @property
    def is_chat(self) -> bool:
        """Whether it has messages, for which the chat template is compiled."""
        ...

    @property
    def num_bytes(self) -> int:
        """The bytes of its texts."""
        ...

    @property
    def is_question(self) -> bool:
        """Whether it is a chat's question, and no text to continue."""
        ...

    @property
    def answer_tokens(self) -> int:
        """The tokens that its answer may have."""
        ...

    def count(self, tokenizer: Tokenizer | None, template: str | None) -> int:
        """Return the tokens of the prompt with its answer; an estimate without a tokenizer."""
        ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """What this process needs beside the model, the sizes of the model's contexts, and the tokens of a held prompt.

    `count_prompt` returns the tokens of the prompt with its answer, 0 without one. It may load the vocabulary.
    """

    baseline: ProcessBaseline
    sizes: ContextSizes
    count_prompt: Callable[[], int]


def prompt_tokens_of(
    prompt: PlannedPrompt | None,
    spec: ModelSpec,
    budget: Budget,
    load_tokenizer: Callable[[], Tokenizer] | None,
) -> int:
    """Return the tokens of the prompt with its answer, 0 without one.

    They are an estimate without a tokenizer, and where the budget has no room to tokenise the prompt now.
    """
    if prompt is None:
        return 0
    needed = tokenising_bytes(spec, prompt.num_bytes) + template_bytes(spec)
    if read_process_memory().resident_bytes + needed > budget.num_bytes:
        load_tokenizer = None
    if load_tokenizer is None:
        return prompt.count(None, spec.chat_template)
    tokenizer = load_tokenizer()
    return prompt.count(tokenizer, template_of(spec, tokenizer)[0])


Progress = Callable[[int], None]
"""Called with a number of bytes each time so many were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model's spec, the machine, the backend that runs it, and the memory plan.

    `request`, `baseline` and `sizes` are what the plan was made from; `policy` is resolved for the model.
    `engine_kernels_reason` says why the engine's own kernels compute what the options left open; None where
    lowtide's do.
    """

    spec: ModelSpec
    machine: Machine
    plan: MemoryPlan
    request: PlanRequest
    options: LoadConfig
    policy: AttentionPolicy
    baseline: ProcessBaseline
    sizes: ContextSizes
    backend: Backend
    gpu: GpuBudget | None = None
    speculation: SpeculationConfig | None = None
    engine_kernels_reason: str | None = None
    quality: QualityChoice | None = None
    """What the option `quality` chose, and its measured distance; None where answers are asked to be exact."""

    @property
    def kernels(self) -> dict[str, str]:
        """Who computes attention and matmuls, and the engine's library."""
        return self.backend.kernels(self)

    @property
    def attention_in_words(self) -> str:
        """Who computes attention and how."""
        return self.backend.describe_attention(self.spec, self.policy)

    def require_fit(self) -> None:
        """Raise `OverBudget` where the plan, or what this process has used so far, is over the budget."""
        require_fit(self.plan, self.spec, self.request, self.baseline, self.sizes)
        peak = read_process_memory().peak_bytes
        if peak > self.plan.budget.num_bytes:
            raise OverBudget(
                "this process, at its peak so far,",
                peak,
                self.plan.budget.num_bytes,
                f"raise {option('memory')}, or open the model in a process of its own",
            )


class LoadedModel:
    """A model in memory with the kernels that compute its attention; `kernels` is None for the engine's own.

    `hook` is `kernels` where those run in llama.cpp's graph. `reclaimers` release memory beside the KV cache.
    `threads` chooses the threads of each pass; None where their number does not change.
    """

    def __init__(
        self,
        model: Model,
        kernels: AttentionKernels | None = None,
        *,
        hook: LlamaHook | None = None,
        reclaimers: Sequence[Reclaimer] = (),
        threads: ThreadChooser | None = None,
    ) -> None:
        self.model = model
        self.kernels = kernels
        self.hook = hook
        self.reclaimers = tuple(reclaimers)
        self.threads = threads

    def load_filter_context(self, filter_prefill: FilterPrefill) -> Model:
        """Make a second KV cache on the model's weights, for GemFilter's first pass, which ends early.

        Close it before this one.
        """
        raise UnsupportedModel(
            f"prompts cannot be filtered on {self.model.spec.name}: no kernels of lowtide run in it"
        )

    def embedder(self, options: LoadOptions) -> AbstractContextManager[GgufEmbedder]:
        """Make a context that embeds with the model's weights, for a block."""
        raise UnsupportedModel(
            f"{self.model.spec.name} cannot embed: lowtide embeds with GGUF models"
        )

    def check_graph(self) -> None:
        """Raise `LowtideError` where the passes so far show a graph that repacked weights do not work with."""

    def close(self) -> None:
        """Free the model and its kernels; closing twice is allowed."""
        self.model.close()


class Backend(ABC):
    """An inference engine, with what planning and loading need to know of it. It has no state."""

    supports_draft_models: bool = True
    """Whether a draft model may speculate for its models."""
    supports_calibration: ClassVar[bool] = True
    """Whether `lowtide calibrate` works on its models."""
    plans_without_kernels: ClassVar[bool] = False
    """Whether one plan decides if lowtide's kernels run; otherwise there is a plan for each of `kernel_choices`."""
    runs_without_repack: ClassVar[bool] = True
    """Whether the plan for repacked weights holds for the original ones too."""

    def kernel_choices(self, spec: ModelSpec, config: LoadConfig) -> tuple[KernelChoice, ...]:
        """Return which kernels may run where `config` says "auto", from the header alone, the preferred first.

        There is more than one where a plan that leaves lowtide's kernels out needs a spec of its own.
        """
        return (KernelChoice(reason=f"lowtide has no kernels for {spec.name}"),)

    def measured_choice(
        self, spec: ModelSpec, choice: KernelChoice, budget: Budget
    ) -> KernelChoice:
        """Return `choice` without kernels that do not run on this machine, or are slower than the engine's own."""
        return choice

    def driver_memory(self, spec: ModelSpec, plan: MemoryPlan, gpu: GpuBudget) -> DriverMemory:
        """Return what the drivers of the GPUs in `plan` take beside the engine's buffers."""
        return ESTIMATED

    @abstractmethod
    def resolve(
        self, spec: ModelSpec, config: LoadConfig, policy: AttentionPolicy
    ) -> tuple[ModelSpec, AttentionPolicy]:
        """Return the spec and the policy to plan with; raise `BadOption` for options that do not apply."""

    @abstractmethod
    def measure(
        self,
        spec: ModelSpec,
        policy: AttentionPolicy,
        budget: Budget,
        prompt: PlannedPrompt | None = None,
    ) -> AbstractContextManager[Measurement]:
        """Measure what this process needs beside the model; yield it with the sizes of contexts.

        Libraries are imported and the vocabulary is loaded, as far as the budget allows and where its size is not
        known. The sizes may be used inside the block only as the measured ones; afterwards they fall back to
        formulas. The tokens of `prompt` are counted inside the block, too.
        """

    def repack(self, spec: ModelSpec, progress: Progress = lambda _: None) -> ModelSpec:
        """Return the spec of the model's repacked copy; make the copy where there is no valid one.

        Raises `CannotRepack` with the reason where no matrix can be repacked or the copy cannot be written.
        """
        raise CannotRepack(f"{spec.name} has no weights that lowtide's kernels can read")

    @abstractmethod
    def load(self, resolved: ResolvedModel, profiler: Profiler) -> LoadedModel:
        """Load the weights and make the KV cache as planned; `profiler` times both."""

    def library(self) -> str:
        """Return the engine's library with its version, as far as it is loaded."""
        return "a Model object"

    def kernels(self, resolved: ResolvedModel) -> dict[str, str]:
        """Return who computes attention and matmuls, with the instruction set, and the engine's library."""
        spec = resolved.spec
        attention = (
            f"lowtide, {usable_kernel_sets()[0]}"
            if resolved.policy.uses_native_kernels
            else spec.engine
        )
        has_tiles = resolved.options.repack is True
        return {
            "attention": attention,
            "matmuls": f"lowtide, {matmul_kernels()}" if has_tiles else spec.engine,
            "library": self.library(),
        }

    def describe_attention(self, spec: ModelSpec, policy: AttentionPolicy) -> str:
        """Return, in words, who computes attention and how."""
        return str(policy)

    def verifies_trees(self, spec: ModelSpec, policy: AttentionPolicy) -> bool:
        """Whether drafts may have branches, if the model's layers are not on a GPU."""
        return False

    def why_one_sequence(self, spec: ModelSpec) -> str | None:
        """Say why the model computes one sequence at a time; None where several share a pass."""
        return f"{spec.engine} runs it that way"

    def verification_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool
    ) -> str | None:
        """Say why verifying drafts may change greedy answers; None where it cannot.

        `rows_agree` says whether logits of one token beside others were found equal to those alone.
        """
        if resolved.policy.shares_selection:
            return f"{resolved.policy.name} selects keys once for all tokens of a verification"
        return None if rows_agree else self.rounding(resolved)

    def batch_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool, exact_prefill: bool
    ) -> str | None:
        """Say why a greedy answer in a batch may differ from that of its prompt alone; None where it cannot."""
        return None if rows_agree else self.rounding(resolved)

    def rounding(self, resolved: ResolvedModel) -> str:
        """Say that a token's logits depend on the tokens computed with it, which was measured."""
        return (
            f"matmuls of {self.weight_types(resolved.spec)} on this machine round a token's result by the "
            "tokens computed with it"
        )

    def weight_types(self, spec: ModelSpec) -> str:
        """Return the types of the weights, as the engine calls them."""
        return spec.quantisation
