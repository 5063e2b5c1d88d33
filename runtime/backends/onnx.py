"""OnnxBackend: ONNX decoders through onnxruntime.

A graph runs as it is, with its own attention, or rewritten: then lowtide's kernels compute attention and,
with `repack`, the matmuls, and the KV cache has lowtide's layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from lowtide.attention.bindings.library import usable_kernel_sets
from lowtide.attention.bindings.onnx_ops import OnnxAttention, OnnxMatmul
from lowtide.attention.dense import Dense, Llama
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.os.busy import other_work
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan.attention import FilterPrefill
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.onnx.config import CPU, OnnxOptions, onnx_library, provider_name
from lowtide.models.onnx.model import OnnxModel
from lowtide.models.onnx.read_spec import repacked_spec
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.rewrite.plan import RepackPlan
from lowtide.models.onnx.spec import KV_TYPE_OF, OnnxSpec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import (
    Backend,
    LoadedModel,
    Measurement,
    PlannedPrompt,
    Progress,
    ResolvedModel,
)
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.kernels.kernel_choice import NO_ROOM, KernelChoice
from lowtide.runtime.backends.kernels.repack import cannot_store, repacked_onnx
from lowtide.runtime.backends.onnx_baseline import (
    INLINE_COPIES,
    OnnxSizes,
    count_prompt,
    measured_baseline,
)
from lowtide.runtime.backends.threads import PassThreads, ThreadChooser
from lowtide.runtime.profiling.profiler import Profiler

REWRITTEN_KV_TYPES = tuple(sorted(KV_TYPE_OF.values()))
"""KV types of a rewritten graph, whatever it computes in; fp16 unless the user says otherwise."""


class OnnxBackend(Backend):
    """onnxruntime, with lowtide's operators in the graph where a policy or `repack` asks for them."""

    supports_draft_models = False
    supports_calibration = False
    runs_without_repack = False

    def kernel_choices(self, spec: ModelSpec, config: LoadConfig) -> tuple[KernelChoice, ...]:
        """Choose lowtide's operators where the graph can be rewritten, and else the graph as it is.

        The matmuls need lowtide's attention: "auto" leaves them out where the graph's own is asked for.
        """
        spec = _onnx(spec)
        as_it_is = KernelChoice(reason=self._reason_as_it_is(spec, config))
        if as_it_is.reason is not None:
            return (as_it_is,)
        repack_reason = (
            f"its graph {spec.repack}" if isinstance(spec.repack, str) else cannot_store(spec)
        )
        kernels = KernelChoice(attention=True, repack=repack_reason is None, reason=repack_reason)
        return (kernels, replace(as_it_is, reason=NO_ROOM))

    def _reason_as_it_is(self, spec: OnnxSpec, config: LoadConfig) -> str | None:
        """Return why the graph must run as it is where nothing is asked for; None where it need not."""
        if provider_name(config.provider) != provider_name(CPU):
            return f"{config.provider} runs the graph"
        if config.attention == Llama.name:
            return f"{option('attention', Llama.name)} is set"
        if isinstance(spec.rewrite, str):
            return f"its graph {spec.rewrite}"
        if usable_kernel_sets()[:1] == ("portable",):
            return "this processor has no vector instructions that lowtide's kernels know"
        return None

    def resolve(
        self, spec: ModelSpec, config: LoadConfig, policy: AttentionPolicy
    ) -> tuple[ModelSpec, AttentionPolicy]:
        """Rewrite the spec where lowtide's kernels run in the graph; refuse what only llama.cpp can do.

        With `repack` attention is always lowtide's, since the rewritten graph has no KV cache of its own.
        """
        spec = _onnx(spec)
        repack = config.repack is True
        if repack and not policy.uses_native_kernels:
            policy = Dense()
        if policy.uses_native_kernels:
            spec = rewritten_spec(spec, policy, repack=repack)
        if config.gpu_budget(policy) is not None:
            raise BadOption(
                f"gpu_layers or gpu_memory is set, but {spec.name} is an ONNX model and runs on the CPU: leave "
                "them out"
            )
        is_cpu = provider_name(config.provider) == provider_name(CPU)
        if policy.uses_native_kernels and not is_cpu:
            reason = (
                f"{option('repack')} is set"
                if repack
                else f"{option('attention')} is {policy.name!r}"
            )
            raise BadOption(
                f"{option('provider')} is {config.provider!r}, but {reason}, which runs on the CPU: leave "
                "one of them out"
            )
        return spec, policy

    @contextlib.contextmanager
    def measure(
        self,
        spec: ModelSpec,
        policy: AttentionPolicy,
        budget: Budget,
        prompt: PlannedPrompt | None = None,
    ) -> Iterator[Measurement]:
        """Import onnxruntime and load the tokenizer; sizes of contexts are upper bounds by formula."""
        is_rewritten = policy.uses_native_kernels
        sizes = OnnxSizes(_onnx(spec), is_rewritten=is_rewritten)
        baseline = measured_baseline(_onnx(spec), budget, is_rewritten=is_rewritten)
        yield Measurement(baseline, sizes, partial(count_prompt, _onnx(spec), budget, prompt))

    def repack(self, spec: ModelSpec, progress: Progress = lambda _: None) -> ModelSpec:
        """Return the spec with the file of repacked weights; the file is made where needed."""
        return repacked_onnx(_onnx(spec), progress)

    def load(self, resolved: ResolvedModel, profiler: Profiler) -> LoadedModel:
        """Open the session and make the KV cache."""
        spec, options = _onnx(resolved.spec), _options(resolved, profiler)
        loaded: LoadedModel
        if resolved.policy.uses_native_kernels:
            attention = OnnxAttention(resolved.options.num_threads)
            matmul = _matmul_backend(spec, options)
            model = RewrittenOnnxModel(spec, options, attention, matmul)
            threads = _threads(resolved.options, attention, matmul)
            model.attach_threads(threads)
            loaded = LoadedOnnx(model, attention, options, threads)
        else:
            loaded = LoadedModel(OnnxModel(spec, options))
        trim_heap()  # reading the tokenizer takes twice its size, which no copy of weights reuses
        return loaded

    def library(self) -> str:
        """Return onnxruntime with its version."""
        return f"onnxruntime {onnx_library('onnxruntime').__version__}"

    def describe_attention(self, spec: ModelSpec, policy: AttentionPolicy) -> str:
        """Return the policy, or the graph's own operator where it is not rewritten."""
        return str(policy) if policy.uses_native_kernels else _onnx(spec).attention

    def verification_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool
    ) -> str | None:
        """Name what in onnxruntime makes a token's logits depend on the tokens beside it."""
        spec = _onnx(resolved.spec)
        reason = super().verification_nondeterminism(resolved, rows_agree=rows_agree)
        if reason is not None:
            return reason
        if not resolved.policy.uses_native_kernels:
            return (
                f"onnxruntime's {spec.attention} may sum a single token in another order than several: open "
                "with attention='dense'"
            )
        return None


class LoadedOnnx(LoadedModel):
    """A rewritten ONNX model in memory; the model closes its kernels."""

    def __init__(
        self,
        model: RewrittenOnnxModel,
        attention: OnnxAttention,
        options: OnnxOptions,
        threads: ThreadChooser,
    ) -> None:
        super().__init__(model, attention, threads=threads)
        self._rewritten = model
        self._attention = attention
        self._options = options

    def load_filter_context(self, filter_prefill: FilterPrefill) -> RewrittenOnnxModel:
        """Make a second KV cache in the model's session."""
        model = self._rewritten
        return RewrittenOnnxModel(
            _onnx(model.spec), self._options, self._attention, weights_of=model
        )


def rewritten_spec(spec: OnnxSpec, policy: AttentionPolicy, *, repack: bool) -> OnnxSpec:
    """Return the spec of the graph with lowtide's attention and, with `repack`, its matmuls.

    Raises `BadOption` where the graph cannot be rewritten.
    """
    if repack:
        if isinstance(spec.repack, str):
            raise BadOption(
                f"{option('repack')} does not work for {spec.name}, because its graph {spec.repack}: leave it out, or "
                "use the model as a GGUF file"
            )
        spec = repacked_spec(spec, spec.repack)
    if isinstance(spec.rewrite, str):
        raise BadOption(
            f"{option('attention')} is {policy.name!r}, but {spec.name} must run with its own {spec.attention}, "
            f"because its graph {spec.rewrite}: leave {option('attention')} out, or use the model as a "
            "GGUF file"
        )
    return replace(
        spec,
        cache_copies=1,
        kv_types=REWRITTEN_KV_TYPES,
        copied_bytes=spec.copied_bytes + (INLINE_COPIES - 1) * spec.rewrite.inline_bytes,
    )


def _onnx(spec: ModelSpec) -> OnnxSpec:
    assert isinstance(spec, OnnxSpec), "the backend is chosen by the spec's engine"
    return spec


def _matmul_backend(spec: OnnxSpec, options: OnnxOptions) -> OnnxMatmul | None:
    if spec.tiles is None or not isinstance(spec.repack, RepackPlan):
        return None
    return OnnxMatmul(spec.repack, spec.tiles, options.batch_size, options.threads)


def _threads(
    config: LoadConfig, attention: OnnxAttention, matmul: OnnxMatmul | None
) -> ThreadChooser:
    """Let the threads of lowtide's nodes follow the load of the machine, unless their number was asked for."""

    def apply(threads: PassThreads) -> None:
        attention.set_threads(threads.count)
        if matmul is not None:
            matmul.set_threads(threads.count)

    others = other_work() if config.threads is None else None
    return ThreadChooser(config.num_threads, apply, others=others)


def _options(resolved: ResolvedModel, profiler: Profiler) -> OnnxOptions:
    plan = resolved.plan
    return OnnxOptions(
        context=plan.context,
        batch_size=plan.batch_size,
        threads=resolved.options.num_threads,
        kv_type=plan.kv_type,
        background=resolved.options.background,
        provider=resolved.options.provider,
        verify_batch=max(plan.verify_batch, 1),
        stage=profiler.span,
    )
