"""GgufBackend: GGUF models through llama.cpp.

Loading makes the process take what was planned: the KV cache is demand-zero memory whose pages are released
with the tokens (`memory/os/kv_pages.py`), and weights that do not fit are mapped lazily and evicted layer by
layer. Lowtide's kernels run in llama.cpp's graph through `LlamaHook`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

from lowtide.attention.bindings.decode import install_guarded_passes
from lowtide.attention.bindings.library import guarded_aborts, lazy_mappings
from lowtide.attention.bindings.llama_hook import LlamaHook, isolate_spans, mapped_spans
from lowtide.attention.bindings.tokenize import install_guarded_tokenizer
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.budget import Budget
from lowtide.memory.machine import read_machine
from lowtide.memory.os.busy import other_work
from lowtide.memory.os.file_mappings import FileMap, read_file_maps, release_pages, use_large_folios
from lowtide.memory.os.kv_pages import DemandZeroBuffer, KVPageReclaimer, demand_zero_buffers
from lowtide.memory.plan.attention import FilterPrefill
from lowtide.memory.plan.driver import DriverMemory
from lowtide.memory.plan.estimates import (
    kv_token_bytes,
    max_matmul_width,
    padded_context,
)
from lowtide.memory.plan.gpu import GpuBudget
from lowtide.memory.plan.line import FILTER_PREFILL
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.reclaim import Reclaimer, reclaim
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.draft_tree import GgufTreeModel
from lowtide.models.gguf.embedding import GgufEmbedder, Weights
from lowtide.models.gguf.header.repacked import REPACKABLE_TYPES
from lowtide.models.gguf.llama_cpp import is_loaded, llama_library
from lowtide.models.gguf.model import GgufModel, refuse_first_pass
from lowtide.models.gguf.parameters import DeviceLayers, LoadOptions
from lowtide.models.onnx.config import CPU
from lowtide.models.spec import KV_PADDING, ModelSpec
from lowtide.runtime.backends.backend import (
    Backend,
    LoadedModel,
    Measurement,
    PlannedPrompt,
    Progress,
    ResolvedModel,
)
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.driver_memory import driver_memory
from lowtide.runtime.backends.first_pass import try_first_pass
from lowtide.runtime.backends.gguf_baseline import measured_baseline
from lowtide.runtime.backends.kernels.kernel_choice import KernelChoice
from lowtide.runtime.backends.kernels.kernel_times import measured_choice
from lowtide.runtime.backends.kernels.repack import cannot_store, repacked_gguf
from lowtide.runtime.backends.kernels.repack_in_memory import repack_mapped, repacked_while_loading
from lowtide.runtime.backends.threads import PassThreads, ThreadChooser
from lowtide.runtime.profiling.profiler import Profiler

_maps_lock = threading.Lock()
"""One model is loaded at a time: its mappings are found by comparing with those that were there before."""


class GgufBackend(Backend):
    """llama.cpp, with lowtide's kernels in its graph where a policy or `repack` asks for them."""

    plans_without_kernels = True

    def kernel_choices(self, spec: ModelSpec, config: LoadConfig) -> tuple[KernelChoice, ...]:
        """Choose lowtide's attention, and its matmuls where a type of the weights can be repacked; no GPU layers."""
        if config.uses_gpu:
            return (KernelChoice(reason="layers are on a GPU"),)
        if spec.tensor_types.isdisjoint(REPACKABLE_TYPES):
            reason = f"{spec.quantisation} weights cannot be repacked"
            return (KernelChoice(attention=True, reason=reason),)
        no_place = cannot_store(spec)
        return (KernelChoice(attention=True, repack=no_place is None, reason=no_place),)

    def measured_choice(
        self, spec: ModelSpec, choice: KernelChoice, budget: Budget
    ) -> KernelChoice:
        """Compare the kernels once for each model and machine, where llama.cpp is loaded and the budget has room."""
        return measured_choice(spec, choice, budget) if is_loaded() else choice

    def driver_memory(self, spec: ModelSpec, plan: MemoryPlan, gpu: GpuBudget) -> DriverMemory:
        """Measure it once for each model, device and driver, in a process of its own."""
        return driver_memory(spec, plan, gpu)

    def resolve(
        self, spec: ModelSpec, config: LoadConfig, policy: AttentionPolicy
    ) -> tuple[ModelSpec, AttentionPolicy]:
        """Refuse an execution provider: those are onnxruntime's. Find out where repacked weights will lie."""
        if config.provider != CPU:
            raise BadOption(
                f"{option('provider')} is {config.provider!r}, but {spec.name} is a GGUF model and providers are for "
                f"ONNX models: leave it out; {option('gpu_layers')} puts a GGUF model on a GPU"
            )
        if config.repack:
            spec = replace(spec, no_copy_reason=cannot_store(spec))
        return spec, policy

    def measure(
        self,
        spec: ModelSpec,
        policy: AttentionPolicy,
        budget: Budget,
        prompt: PlannedPrompt | None = None,
    ) -> AbstractContextManager[Measurement]:
        """Import what an answer needs and let llama.cpp lay the model out without its weights."""
        return measured_baseline(spec, budget, prompt)

    def repack(self, spec: ModelSpec, progress: Progress = lambda _: None) -> ModelSpec:
        """Return the spec of the repacked GGUF file in the cache folder; the file is made where needed.

        Where it has no place, weights are repacked in memory when the model is loaded.
        """
        if spec.no_copy_reason is None:
            return repacked_gguf(spec, progress)
        return repacked_while_loading(spec)

    def load(self, resolved: ResolvedModel, profiler: Profiler) -> LoadedModel:
        """Make the hook that the plan needs, map or copy the weights, and make the context."""
        with profiler.span("libraries"):
            hook = _make_hook(resolved, profiler)
        try:
            return LoadedGguf(resolved, hook, profiler)
        except BaseException:
            if hook is not None:
                hook.close()
            raise

    def library(self) -> str:
        """Return llama.cpp with its version once it is loaded: a plan alone may not load it."""
        return f"llama.cpp {llama_library().version}" if is_loaded() else "llama.cpp"

    def weight_types(self, spec: ModelSpec) -> str:
        """Return the types of the tensors, but for those that are not quantised."""
        return ", ".join(sorted(spec.tensor_types - {"F32"}))

    def verifies_trees(self, spec: ModelSpec, policy: AttentionPolicy) -> bool:
        """Whether lowtide's attention reads every layer from one KV cache."""
        one_cache = spec.sliding_window is None and not spec.recurrent_state_bytes
        return policy.uses_native_kernels and policy.supports_batch and one_cache

    def why_one_sequence(self, spec: ModelSpec) -> str | None:
        """Name what a llama.cpp context of several sequences cannot have."""
        return "its recurrent state cannot be shared" if spec.recurrent_state_bytes else None

    def verification_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool
    ) -> str | None:
        """Name what in llama.cpp makes a token's logits depend on the tokens beside it."""
        reason = super().verification_nondeterminism(resolved, rows_agree=rows_agree)
        if reason is not None:
            return reason
        if not resolved.policy.uses_native_kernels and resolved.options.num_threads > 1:
            return (
                "llama.cpp's attention sums a single token in another order with several threads: open with "
                "attention='dense', or with one thread"
            )
        return None

    def batch_nondeterminism(
        self, resolved: ResolvedModel, *, rows_agree: bool, exact_prefill: bool
    ) -> str | None:
        """Name what in llama.cpp, or in the policy, makes a sequence depend on the others."""
        if not rows_agree:
            return self.rounding(resolved)
        if not resolved.policy.uses_native_kernels:
            return (
                "llama.cpp's attention sums a sequence in another order beside others: open with "
                "attention='dense'"
            )
        if not exact_prefill:
            return "prompts in bf16 are rounded by how many tokens are computed together"
        return None


def _make_hook(resolved: ResolvedModel, profiler: Profiler) -> LlamaHook | None:
    """Return a hook where lowtide's attention, repacked weights or weight streaming need one.

    A profiler that times layers wants one too, but does without where llama.cpp cannot be hooked.
    """
    is_needed = (
        resolved.policy.uses_native_kernels
        or resolved.plan.resident_layers is not None
        or bool(resolved.spec.repacked_tensors)
    )
    if not is_needed and not profiler.wants_layers:
        return None
    try:
        hook = LlamaHook(resolved.options.num_threads)
    except LowtideError:
        if is_needed:
            raise
        return None
    hook.set_active(resolved.policy.uses_native_kernels)
    profiler.time_layers(hook, resolved.spec.num_layers)
    return hook


class LoadedGguf(LoadedModel):
    """A GGUF model in memory; `callback` is the hook in its graph, where there is one for any reason."""

    def __init__(
        self, resolved: ResolvedModel, callback: LlamaHook | None, profiler: Profiler
    ) -> None:
        self._resolved = resolved
        self._callback = callback
        self._profiler = profiler
        kernels = callback if resolved.policy.uses_native_kernels else None
        plan, spec = resolved.plan, resolved.spec
        if plan.resident_layers is not None:
            use_large_folios(spec.paths, read_machine().available_bytes)
        install_guarded_tokenizer()
        install_guarded_passes()
        if spec.unusual_tensors and plan.gpus:
            refuse_first_pass(llama_library(), spec, try_first_pass(spec.path, self._options()))
        with guarded_aborts(), demand_zero_buffers() as buffers, _new_maps(resolved) as maps:
            self._model = self._load(kernels)
        if plan.resident_layers is not None and callback is not None:
            try:
                _stream_weights(spec, maps, callback, plan.resident_layers)
            except BaseException:
                self._model.close()
                raise
        in_memory = bool(spec.repacked_tensors) and spec.no_copy_reason is not None
        if in_memory:
            self._repack_in_memory(maps)
        if callback is not None and spec.repacked_tensors:
            callback.read_repacked(spec.repacked_tensors, plan.batch_size, max_matmul_width(spec))
        if spec.unusual_tensors and not plan.gpus:
            self._require_first_pass()
        profiler.cache_lies_in(buffers)
        profiler.allocated(self._model.buffers)
        self._release_pages_of(self._model, buffers)
        # Milder levels are for answers in progress, which would read the weights again at once.
        reclaimers = [
            Reclaimer("complete", partial(release_pages, file_map))
            for file_maps in maps
            for file_map in file_maps
            if not in_memory  # the file does not have these tiles
        ]
        threads = self._choose_threads()
        super().__init__(self._model, kernels, hook=kernels, reclaimers=reclaimers, threads=threads)

    def _choose_threads(self) -> ThreadChooser:
        """Let the threads of each pass follow the load of the machine, unless their number was asked for.

        llama.cpp's attention sums a single token in another order with another number of threads, once its
        cache has a second block: from there on the number is fixed, so that answers stay the same.
        """
        config, policy, model = self._resolved.options, self._resolved.policy, self._model
        hook = self._callback if policy.uses_native_kernels else None
        has_team = hook is not None and bool(self._resolved.spec.repacked_tensors)

        def apply(threads: PassThreads) -> None:
            model.set_threads(threads.engine)
            if hook is not None:
                hook.set_threads(threads.helped)

        threads = ThreadChooser(
            config.num_threads,
            apply,
            has_team=has_team and config.num_threads > 1,
            settle=hook.settle if hook is not None else lambda: None,
            others=other_work() if config.threads is None else None,
            fixed_from=None if policy.uses_native_kernels else KV_PADDING,
        )
        model.attach_threads(threads)
        return threads

    def _require_first_pass(self) -> None:
        try:
            self._model.require_first_pass()
        except BaseException:
            self._model.close()
            raise

    def _repack_in_memory(self, maps: Sequence[frozenset[FileMap]]) -> None:
        try:
            with self._profiler.span("repacking"):
                repack_mapped(self._resolved.spec, maps)
        except BaseException:
            self._model.close()
            raise

    def _load(self, kernels: LlamaHook | None) -> GgufModel:
        spec, options = self._resolved.spec, self._options()
        if options.sequences > 1 and kernels is not None:
            return GgufTreeModel(spec, options, kernels)
        return GgufModel(spec, options, kernels)

    def _options(self) -> LoadOptions:
        resolved, plan = self._resolved, self._resolved.plan
        return LoadOptions(
            context=plan.context,
            batch_size=plan.batch_size,
            threads=resolved.options.num_threads,
            kv_type=plan.kv_type,
            background=resolved.options.background,
            memory_map=plan.memory_map,
            repack=plan.resident_layers is None and not resolved.options.repack,
            eval_callback=self._callback.callback if self._callback else None,
            stage=self._profiler.span,
            gpu_layers=tuple(DeviceLayers(gpu.device.name, gpu.num_layers) for gpu in plan.gpus),
            gpu_attention=not resolved.policy.uses_native_kernels,
            verify_batch=max(plan.verify_batch, 1),
            sequences=plan.verify_batch if plan.branches else 1,
        )

    def load_filter_context(self, filter_prefill: FilterPrefill) -> GgufModel:
        """Make a second llama.cpp context on the model's weights."""
        with guarded_aborts(), demand_zero_buffers() as buffers:
            context = GgufModel(self._resolved.spec, self._options(), weights_of=self._model)
        self._profiler.cache_lies_in(buffers, FILTER_PREFILL)
        num_unused = 2 * (self._resolved.spec.num_layers - filter_prefill.num_layers)
        self._release_pages_of(context, buffers, num_unused)
        return context

    @contextlib.contextmanager
    def embedder(self, options: LoadOptions) -> Iterator[GgufEmbedder]:
        """Make a llama.cpp context that embeds, on the model's weights.

        The hook multiplies weights that are repacked, and leaves attention to llama.cpp.
        """
        weights = Weights(self._model.handle, self._model.tokenizer)
        with self._hooked(options) as hooked:
            with guarded_aborts(), demand_zero_buffers():
                embedder = GgufEmbedder(self._resolved.spec, hooked, llama_library(), weights)
            with contextlib.closing(embedder):
                yield embedder

    @contextlib.contextmanager
    def _hooked(self, options: LoadOptions) -> Iterator[LoadOptions]:
        """Let the hook read repacked weights in passes as long as `options` say, for the block."""
        spec, hook = self._resolved.spec, self._callback
        if hook is None or not spec.repacked_tensors:
            yield options
            return
        names, width = spec.repacked_tensors, max_matmul_width(spec)
        hook.set_active(False)
        hook.read_repacked(names, options.batch_size, width)
        try:
            yield replace(options, eval_callback=hook.callback)
        finally:
            hook.read_repacked(names, self._resolved.plan.batch_size, width)
            hook.set_active(self._resolved.policy.uses_native_kernels)

    def _release_pages_of(
        self, model: GgufModel, buffers: Sequence[DemandZeroBuffer], num_unused: int = 0
    ) -> None:
        """Let the model release pages of its KV cache with its tokens, where their place is known."""
        spec, plan = self._resolved.spec, self._resolved.plan
        token_bytes = kv_token_bytes(spec, plan.kv_type)
        if token_bytes is None or plan.gpu_cache_bytes:
            return
        model.attach_pages(
            KVPageReclaimer(
                buffers,
                num_tensors=2 * spec.num_layers,
                num_slots=padded_context(plan.context),
                token_bytes=token_bytes,
                num_unused=num_unused,
            )
        )

    def check_graph(self) -> None:
        """Raise `LowtideError` where the graph reads repacked weights in a way the kernels do not support."""
        if self._callback is not None and self._callback.counts().repacked_refused:
            spec = self._resolved.spec
            raise LowtideError(
                f"{spec.name} ({spec.architecture}) reads repacked weights in a way that lowtide's kernels do "
                f"not support: leave {option('repack', True)} out"
            )

    def close(self) -> None:
        """Free the model, then the hook in its graph; of what a broken pass used, only pages that can be read again."""
        is_broken = llama_library().broken.hold_weights(self._model.handle)
        if is_broken:
            reclaim(self.reclaimers, "complete")
        super().close()
        if self._callback is not None and not is_broken:
            self._callback.close()
        self._callback = None


@contextlib.contextmanager
def _new_maps(resolved: ResolvedModel) -> Iterator[list[frozenset[FileMap]]]:
    """Yield a list that, after the block, has the mappings that the block made of each of the model's files.

    Where weights are streamed, the mappings are not populated.
    """
    paths, maps = resolved.spec.paths, list[frozenset[FileMap]]()
    if not resolved.plan.memory_map:
        yield maps
        return
    lazily = lazy_mappings() if resolved.plan.resident_layers is not None else nullcontext()
    with _maps_lock, lazily:
        before = [read_file_maps(path) for path in paths]
        yield maps
        maps += (read_file_maps(path) - old for path, old in zip(paths, before, strict=True))


def _stream_weights(
    spec: ModelSpec, maps: Sequence[frozenset[FileMap]], hook: LlamaHook, resident_layers: int
) -> None:
    """Have the hook evict all weights after use, except those of the first `resident_layers` layers."""
    spans = mapped_spans(spec, maps)
    isolate_spans(spec, spans, chain.from_iterable(maps))
    in_layers = (group.layer is not None for group in spec.weight_groups)
    resident = bytes(is_layer and i < resident_layers for i, is_layer in enumerate(in_layers))
    hook.stream_weights(spans, resident)
