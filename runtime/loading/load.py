"""Engine: a planned model in memory, with the attention that was asked for. Knows no prompt.

Makes the graph hook that a plan needs, and keeps it told of what happens to the cache."""

from __future__ import annotations

import gc

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.policy import PassController
from lowtide.memory.budget import Ledger
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan.attention import FilterPrefill
from lowtide.memory.plan.estimates import (
    filter_layers_bytes,
    kv_bytes,
    tokenising_bytes,
)
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.plan.line import CACHE, FILTER_PREFILL, PREFIXES, PROMPT
from lowtide.memory.process import read_process_memory
from lowtide.memory.reclaim import Reclaimed, Reclaimer, reclaim
from lowtide.memory.units import OverBudget, format_bytes
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.model import GgufModel
from lowtide.models.model import Model
from lowtide.models.onnx.rewrite.model import RewrittenOnnxModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.generation.generate import GenerationContext
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.kv.prefix_cache import PrefixCache
from lowtide.runtime.kv.prompt_filter import PromptFilter
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.gguf import load_filter_context, load_gguf
from lowtide.runtime.loading.onnx import load_onnx, load_onnx_filter_context
from lowtide.runtime.loading.repack import with_repacked_weights
from lowtide.runtime.loading.speculation import load_speculator
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.profiling.memory import WatchedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.speculation.speculator import Speculator


def llama_hook(planned: ResolvedModel, profiler: Profiler) -> LlamaHook | None:
    """Our attention needs a hook, and so do packed weights and giving weights back; times of layers can be
    gone without.
    """
    is_needed = (
        planned.policy.uses_native_kernels
        or planned.plan.resident_layers is not None
        or bool(planned.spec.repacked_tensors)
    )
    if not is_needed and not profiler.wants_layers:
        return None
    try:
        hook = LlamaHook(planned.options.num_threads)
    except LowtideError:
        if is_needed:
            raise
        return None
    hook.set_active(planned.policy.uses_native_kernels)
    profiler.time_layers(hook, planned.spec.num_layers)
    return hook


def tell_cuts(model: Model, hook: LlamaHook) -> None:
    """Tokens may come back in another way than by a pass: what the hook keeps of them is cut, too."""
    if not isinstance(model, GgufModel):
        return
    told = model.on_cut

    def cut(num_used: int, num_kept: int) -> None:
        hook.truncate(num_kept)
        if told is not None:
            told(num_used, num_kept)

    model.on_cut = cut


class Engine:
    """Reserves the plan's rows and loads; `model` stands in for the planned file's.

    `controller` is told of each pass, `growth` asked for the tokens of each, `profiler` told of what is
    loaded. Raises `OverBudget` before anything is loaded where the plan does not fit, and after loading
    where the process is over it all the same. `reclaimers` are called, in order, to give memory back; the
    heap comes last, for what the others free.
    """

    def __init__(
        self, planned: ResolvedModel, model: Model | None = None, profiler: Profiler = SILENT
    ) -> None:
        planned.require_fit()
        self.not_repacked_reason: str | None = None
        if planned.options.repack and model is None:
            planned, self.not_repacked_reason = with_repacked_weights(planned, profiler)
        wanted_bytes = planned.options.prefix_bytes
        if wanted_bytes and model is not None and not model.supports_copy:
            raise BadOption(
                f"a prefix cache of {format_bytes(wanted_bytes)} is wanted, {model.spec.name} cannot copy "
                "its KV cache: leave prefix_cache out"
            )
        self.planned = planned
        self.ledger = Ledger(planned.plan.budget.num_bytes)
        for row in planned.plan.rows:
            self.ledger.reserve(row.component, row.num_bytes)
        self._callback: LlamaHook | None = None
        self._onnx_attention: OnnxAttention | None = None
        self._profiler = profiler
        self.prefixes = PrefixCache(self.ledger.components.get(PREFIXES, 0))
        self.reclaimers = [Reclaimer("moderate", self.prefixes.clear)]
        self.speculator: Speculator | None = None
        profiler.watch(planned, self._watched())
        if model is None and isinstance(planned.spec, OnnxSpec):
            model, self._onnx_attention = load_onnx(
                planned, planned.spec, self.reclaimers, profiler
            )
        elif model is None:
            with profiler.span("libraries"):
                self._callback = llama_hook(planned, profiler)
            try:
                model = load_gguf(planned, self._callback, self.reclaimers, profiler)
            except BaseException:
                if self._callback is not None:
                    self._callback.close()
                raise
        self.model = model
        profiler.count_tokens(lambda: model.num_tokens)
        self.controller = self._controller()
        self.growth = KVReservation(self.ledger, planned.plan.cache_tokens, self._kv_bytes)
        self.prompt_filter = self._prompt_filter()
        if planned.plan.resident_layers is not None or planned.spec.repacked_tensors:
            self._try_passes()
        self.speculator = self._loaded_speculator()
        self.reclaimers += (Reclaimer("moderate", gc.collect), Reclaimer("background", trim_heap))
        self._check_resident()

    def _controller(self) -> PassController:
        """Give our kernels the policy, wherever they run."""
        baseline, policy = self.attention_kernels, self.planned.policy
        if baseline is None:
            return PassController()
        if self.hook is not None:
            tell_cuts(self.model, self.hook)
        return policy.configure(baseline, self.planned.spec)

    def _prompt_filter(self) -> PromptFilter | None:
        """Make what shortens prompts, where the policy has that done."""
        plan, policy = self.planned.plan, self.planned.policy
        scorer, selector = self.attention_kernels, policy.prompt_selector
        first = policy.memory.filter_prefill
        if scorer is None or selector is None or first is None:
            return None
        reader, row_bytes = self._reader(first), self.ledger.components[FILTER_PREFILL]

        def bytes_of(num_tokens: int) -> int:
            more = self._first_layers_bytes(num_tokens) - self._first_layers_bytes(plan.kv_tokens)
            return row_bytes + max(more, 0)

        growth = KVReservation(self.ledger, plan.kv_tokens, bytes_of, component=FILTER_PREFILL)
        made = PromptFilter(reader, scorer, selector, growth, keeps=plan.cache_filter_pass)
        self.reclaimers.insert(0, Reclaimer("moderate", made.forget))
        return made

    def _reader(self, first: FilterPrefill) -> Model:
        """Make a second cache on the model's weights, for passes that end early."""
        planned, reclaimers, model = self.planned, self.reclaimers, self.model
        if self._onnx_attention is not None and isinstance(model, RewrittenOnnxModel):
            attention = self._onnx_attention
            return load_onnx_filter_context(model, planned, attention, reclaimers, self._profiler)
        assert isinstance(model, GgufModel) and self.hook is not None, (
            "our kernels run in its graph"
        )
        return load_filter_context(model, planned, self.hook, first, reclaimers, self._profiler)

    def _loaded_speculator(self) -> Speculator | None:
        try:
            return load_speculator(self.planned, self.model, self.controller)
        except BaseException:
            self.close()
            raise

    def most_tokens(self) -> int:
        """Return how many tokens a prompt may have now: the context, or what the budget allows."""
        most = self.growth.most_tokens(self.model.context)
        return max(most, self.prompt_filter.most_tokens()) if self.prompt_filter else most

    def new_session(self) -> KVSession:
        """Return the session of the model's one cache."""
        return KVSession(
            self.model,
            self.controller,
            self.growth,
            self._profiler,
            prefixes=self.prefixes,
            prompt_filter=self.prompt_filter,
        )

    def generation_context(self) -> GenerationContext:
        """Return what an answer's statistics tell of the model and its plan."""
        plan = self.planned.plan
        return GenerationContext(
            budget_bytes=plan.budget.num_bytes,
            planned_bytes=plan.total_bytes,
            attention=self.planned.attention_in_words,
            repacked_tensors=len(self.planned.spec.repacked_tensors),
            not_repacked_reason=self.not_repacked_reason,
            kernel_counts=self.kernel_counts,
            watchdog=Watchdog(plan.budget.num_bytes, self.trim),
            speculator=self.speculator,
        )

    @property
    def hook(self) -> LlamaHook | None:
        """Our kernels in llama.cpp's graph; None where llama.cpp's own run."""
        return self._callback if self.planned.policy.uses_native_kernels else None

    def trim(self, level: str) -> Reclaimed:
        """Give back what `level` allows; not during a pass. Raises `BadOption` for a level that is none."""
        return reclaim(self.reclaimers, level)

    def _try_passes(self) -> None:
        """Read weights once, so that a model whose graph is not as we know it is found out now."""
        self.controller.begin_prefill()
        for num_rows in {1, min(2, self.planned.plan.batch_size)}:
            self.model.forward((0,) * num_rows)
            self.model.truncate(0)
        counts = self._callback.counts() if self._callback is not None else None
        if counts is not None and counts.repacked_refused:
            self.close()
            raise LowtideError(
                f"{self.planned.spec.name} ({self.planned.spec.architecture}) reads packed weights in a "
                "way that our kernels do not know: leave --repack out"
            )

    def _kv_bytes(self, num_tokens: int) -> int:
        spec, plan = self.planned.spec, self.planned.plan
        return kv_bytes(spec, num_tokens, plan.kv_type)

    def _first_layers_bytes(self, num_tokens: int) -> int:
        first = self.planned.policy.memory.filter_prefill
        num_layers = first.num_layers if first else 0
        return filter_layers_bytes(
            self.planned.spec, num_layers, num_tokens, self.planned.plan.kv_type
        )

    def check(self, options: SamplingParams, *, is_completion: bool = False) -> None:
        """Raise `BadOption` where the policy cannot do what is asked."""
        policy = self.planned.policy
        if is_completion and policy.completion_refusal is not None:
            raise BadOption(policy.completion_refusal)
        if options.explain and self.prompt_filter is None:
            raise BadOption(
                f"explain shows what gem kept of a prompt, attention is {policy.name}: open with "
                "attention='gem', or leave explain out"
            )

    @property
    def attention_kernels(self) -> AttentionKernels | None:
        """Where our kernels run; None where the engine's own do."""
        return self._onnx_attention or self.hook

    def kernel_counts(self) -> KernelCounts | None:
        """Return what our kernels have done; None where the engine's own run."""
        ours = self.attention_kernels
        return ours.counts() if ours is not None else None

    def has_room_to_tokenise(self, text_bytes: int, num_tokens: int) -> bool:
        """Whether a text can be tokenised while the cache holds `num_tokens`."""
        return tokenising_bytes(self.planned.spec, text_bytes) <= self.idle_bytes(num_tokens)

    def idle_bytes(self, num_tokens: int) -> int:
        """Return what of the plan nothing holds between prompts, while the cache holds `num_tokens`.

        The row for tokenising is there for that, and the memory that the cache does not use yet.
        """
        reserved = self.ledger.components
        idle = reserved[PROMPT]
        if self.planned.baseline.kv_on_demand:
            idle += max(reserved[CACHE] - self._kv_bytes(num_tokens), 0)
        return idle

    def _watched(self) -> WatchedModel:
        """What a profiler may ask of the model, while it is loaded and later."""
        spec, plan = self.planned.spec, self.planned.plan
        return WatchedModel(
            paths=spec.paths,
            file_bytes=spec.file_bytes,
            memory_map=plan.memory_map,
            cache_bytes=kv_bytes(spec, plan.context, plan.kv_type) - plan.gpu_cache_bytes,
            scratch_bytes=lambda: getattr(self.kernel_counts(), "scratch_bytes", 0),
            prefix_bytes=lambda: self.prefixes.num_bytes,
        )

    def _check_resident(self) -> None:
        """The plan's formulas are not measured for every architecture: hold them against the facts.

        The caches' cells are planned, and not yet touched.
        """
        plan, baseline = self.planned.plan, self.planned.baseline
        ahead = self.ledger.components[CACHE] if baseline.kv_on_demand else 0
        if baseline.kv_on_demand and self.prompt_filter is not None:
            first = self._first_layers_bytes(plan.kv_tokens)
            # What is not kept lies where the cache is empty meanwhile.
            ahead = ahead + first if plan.cache_filter_pass else max(ahead, first)
        memory = read_process_memory()
        needed = max(memory.peak_bytes, memory.resident_bytes + ahead)
        if needed > plan.budget.num_bytes:
            self.close()
            raise OverBudget(
                f"{self.planned.spec.name}, loaded,",
                needed,
                plan.budget.num_bytes,
                "raise --memory",
            )

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self._profiler.finish()
        self.prefixes.clear()
        if self.prompt_filter is not None:
            self.prompt_filter.close()
        if self.speculator is not None:
            self.speculator.close()
        self.model.close()
        if self._callback is not None:
            self._callback.close()
            self._callback = None
        for component in self.ledger.components:
            self.ledger.release(component)
