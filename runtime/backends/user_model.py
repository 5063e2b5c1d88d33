"""UserBackend: a `Model` object that the caller made."""

from __future__ import annotations

from contextlib import AbstractContextManager

from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.units import format_bytes
from lowtide.models.errors import BadOption
from lowtide.models.gguf.model import GgufModel
from lowtide.models.model import Model
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import (
    Backend,
    LoadedModel,
    Measurement,
    PlannedPrompt,
    ResolvedModel,
)
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.kernels.kernel_choice import KernelChoice
from lowtide.runtime.profiling.profiler import Profiler


class UserBackend(Backend):
    """Runs `model`, which is loaded already; the plan is made as if `engine` ran it."""

    def __init__(self, model: Model, engine: Backend) -> None:
        self._model = model
        self._engine = engine
        self._is_engines_own = isinstance(model, GgufModel | OnnxModel)
        self.supports_draft_models = engine.supports_draft_models

    def kernel_choices(self, spec: ModelSpec, config: LoadConfig) -> tuple[KernelChoice, ...]:
        """Choose none: the model computes as it was loaded."""
        return (KernelChoice(reason="a Model object computes as it was loaded"),)

    def resolve(
        self, spec: ModelSpec, config: LoadConfig, policy: AttentionPolicy
    ) -> tuple[ModelSpec, AttentionPolicy]:
        """Refuse what needs lowtide's kernels in an engine's graph, and a prefix cache without copies."""
        name, reason = None, "it runs in llama.cpp's or onnxruntime's graph"
        if policy.uses_native_kernels:
            name = f"attention={policy.name!r}"
        elif config.repack:
            name = "repack"
        elif config.gpu_layers or config.gpu_memory is not None:
            name = "gpu_layers"
        elif config.prefix_bytes and not self._model.supports_copy:
            name = f"prefix_cache of {format_bytes(config.prefix_bytes)}"
            reason = f"{spec.name} cannot copy its KV cache"
        if name is not None:
            raise BadOption(
                f"{name} does not work with a Model object, because {reason}: leave {name.split('=')[0].split()[0]} "
                "out, or open the model from its file"
            )
        return self._engine.resolve(spec, config, policy)

    def measure(
        self,
        spec: ModelSpec,
        policy: AttentionPolicy,
        budget: Budget,
        prompt: PlannedPrompt | None = None,
    ) -> AbstractContextManager[Measurement]:
        """Measure what the engine of the model's file would need."""
        return self._engine.measure(spec, policy, budget, prompt)

    def load(self, resolved: ResolvedModel, profiler: Profiler) -> LoadedModel:
        """Return the model: there is nothing to load."""
        return LoadedModel(self._model)

    def kernels(self, resolved: ResolvedModel) -> dict[str, str]:
        """Return what the model's own code computes with, in one word."""
        return dict.fromkeys(("attention", "matmuls", "library"), type(self._model).__name__)

    def describe_attention(self, spec: ModelSpec, policy: AttentionPolicy) -> str:
        """Return what the engine would say."""
        return self._engine.describe_attention(spec, policy)

    def verifies_trees(self, spec: ModelSpec, policy: AttentionPolicy) -> bool:
        """Whether the model itself can."""
        return self._model.verifies_trees

    def why_one_sequence(self, spec: ModelSpec) -> str | None:
        """Ask the model itself; the engine may know the reason."""
        if self._model.supports_batch:
            return None
        reason = self._engine.why_one_sequence(spec)
        return reason or "its class runs it that way"

    def verification_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool
    ) -> str | None:
        """Return what the engine would say, where it runs the model."""
        if self._is_engines_own:
            return self._engine.verification_nondeterminism(resolved, rows_agree=rows_agree)
        return super().verification_nondeterminism(resolved, rows_agree=rows_agree)

    def batch_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool, exact_prefill: bool
    ) -> str | None:
        """Return what the engine would say, where it runs the model."""
        how = {"rows_agree": rows_agree, "exact_prefill": exact_prefill}
        if self._is_engines_own:
            return self._engine.batch_nondeterminism(resolved, **how)
        return super().batch_nondeterminism(resolved, **how)
