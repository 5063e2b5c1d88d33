"""LoadedModel: a planned model in memory, with the attention that was asked for. Knows no prompt.

Makes the graph hook that a plan needs, and keeps it told of what happens to the cache."""

from __future__ import annotations

import gc

from lowtide.attention.bindings.llama_hook import GraphHook, HookCounts
from lowtide.attention.bindings.onnx_ops import OnnxAttention
from lowtide.attention.bindings.policy import KernelHost
from lowtide.attention.gem.policy.policy import Gem
from lowtide.attention.policy import Steering
from lowtide.memory.budget import Ledger
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan.plan.attention import FirstPass
from lowtide.memory.plan.plan.estimates import (
    KeyGroups,
    first_layers_bytes,
    kv_bytes,
    replaced_bytes,
    tokenising_bytes,
)
from lowtide.memory.plan.plan.kv_reservation import KvGrowth
from lowtide.memory.plan.plan.line import CACHE, FIRST_PASS, PREFIXES, PROMPT
from lowtide.memory.process import read_process_memory
from lowtide.memory.reclaim import Releaser, Trim, trim
from lowtide.memory.units import OverBudget, format_bytes
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.model import GgufModel
from lowtide.models.model import Model
from lowtide.models.onnx.rewrite.model import SwappedModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.runtime.generation.generate import RunFacts
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.kv.prefix_cache import PrefixCache
from lowtide.runtime.kv.prompt_filter import PromptFilter
from lowtide.runtime.kv.session import Session
from lowtide.runtime.loading.gguf import load_gguf, load_reader
from lowtide.runtime.loading.onnx import load_onnx, load_onnx_reader
from lowtide.runtime.loading.repack import with_packed_weights
from lowtide.runtime.loading.speculation import load_speculator
from lowtide.runtime.options import GenerationOptions
from lowtide.runtime.planning.plan.plan import PlannedModel
from lowtide.runtime.profiling.memory import WatchedModel
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.speculation.speculator import Speculator


def graph_hook(planned: PlannedModel, profiler: Profiler) -> GraphHook | None:
    """Our attention needs a hook, and so do packed weights and giving weights back; times of layers can be
    gone without.
    """
    is_needed = (
        planned.policy.uses_hook
        or planned.plan.kept_layers is not None
        or bool(planned.spec.packed_tensors)
    )
    if not is_needed and not profiler.wants_layers:
        return None
    try:
        hook = GraphHook(planned.options.num_threads)
    except LowtideError:
        if is_needed:
            raise
        return None
    hook.set_active(planned.policy.uses_hook)
    profiler.time_layers(hook, planned.spec.num_layers)
    return hook


def keep_from_going_back(model: Model, host: KernelHost, groups: KeyGroups | None) -> None:
    """Where groups replace the cache's cells, the model cannot go back to those, nor tell its state."""
    if groups is None or not groups.replaced_layers:
        return
    assert isinstance(model, GgufModel | SwappedModel), "our kernels run in its graph"
    model.keeps_state = model.copies_state = False
    model.least_tokens = lambda: host.least_cells


def tell_cuts(model: Model, hook: GraphHook) -> None:
    """Tokens may come back in another way than by a pass: what the hook keeps of them is cut, too."""
    if not isinstance(model, GgufModel):
        return
    told = model.on_cut

    def cut(num_used: int, num_kept: int) -> None:
        hook.cut(num_kept)
        if told is not None:
            told(num_used, num_kept)

    model.on_cut = cut


class LoadedModel:
    """Reserves the plan's rows and loads; `model` stands in for the planned file's.

    `steering` is told of each pass, `growth` asked for the tokens of each, `profiler` told of what is
    loaded. Raises `OverBudget` before anything is loaded where the plan does not fit, and after loading
    where the process is over it all the same. `releasers` are called, in order, to give memory back; the
    heap comes last, for what the others free.
    """

    def __init__(
        self, planned: PlannedModel, model: Model | None = None, profiler: Profiler = SILENT
    ) -> None:
        planned.require_fit()
        self.unpacked_reason: str | None = None
        if planned.options.pack and model is None:
            planned, self.unpacked_reason = with_packed_weights(planned, profiler)
        wanted_bytes = planned.options.prefix_bytes
        if wanted_bytes and model is not None and not model.copies_state:
            raise BadOption(
                f"a prefix cache of {format_bytes(wanted_bytes)} is wanted, {model.spec.name} cannot copy "
                "its KV cache: leave prefix_cache out"
            )
        self.planned = planned
        self.ledger = Ledger(planned.plan.budget.num_bytes)
        for row in planned.plan.rows:
            self.ledger.reserve(row.owner, row.num_bytes)
        self._callback: GraphHook | None = None
        self._onnx_attention: OnnxAttention | None = None
        self._profiler = profiler
        self.prefixes = PrefixCache(self.ledger.owners.get(PREFIXES, 0))
        self.releasers = [Releaser("moderate", self.prefixes.clear)]
        self.speculator: Speculator | None = None
        profiler.watch(planned, self._watched())
        if model is None and isinstance(planned.spec, OnnxSpec):
            model, self._onnx_attention = load_onnx(planned, planned.spec, self.releasers, profiler)
        elif model is None:
            with profiler.span("libraries"):
                self._callback = graph_hook(planned, profiler)
            try:
                model = load_gguf(planned, self._callback, self.releasers, profiler)
            except BaseException:
                if self._callback is not None:
                    self._callback.close()
                raise
        self.model = model
        profiler.count_tokens(lambda: model.num_tokens)
        self.steering = self._steering()
        self.growth = KvGrowth(self.ledger, planned.plan.cache_tokens, self._kv_bytes)
        self.prompt_filter = self._prompt_filter()
        if planned.plan.kept_layers is not None or planned.spec.packed_tensors:
            self._try_passes()
        self.speculator = self._loaded_speculator()
        self.releasers += (Releaser("moderate", gc.collect), Releaser("background", trim_heap))
        self._check_resident()

    def _steering(self) -> Steering:
        """Give our kernels the policy, wherever they run."""
        host, policy = self.kernel_host, self.planned.policy
        if host is None:
            return Steering()
        if self.hook is not None:
            tell_cuts(self.model, self.hook)
        keep_from_going_back(self.model, host, policy.key_groups)
        return policy.install(host, self.planned.spec)

    def _prompt_filter(self) -> PromptFilter | None:
        """Make what shortens prompts, where the policy has that done."""
        plan, policy, first = self.planned.plan, self.planned.policy, self.planned.policy.first_pass
        scorer = self._onnx_attention or self.hook
        if scorer is None or first is None or not isinstance(policy, Gem):
            return None
        reader, row_bytes = self._reader(first), self.ledger.owners[FIRST_PASS]

        def bytes_of(num_tokens: int) -> int:
            more = self._first_layers_bytes(num_tokens) - self._first_layers_bytes(plan.kv_tokens)
            return row_bytes + max(more, 0)

        growth = KvGrowth(self.ledger, plan.kv_tokens, bytes_of, owner=FIRST_PASS)
        made = PromptFilter(reader, scorer, policy, growth, keeps=plan.keeps_first_pass)
        self.releasers.insert(0, Releaser("moderate", made.forget))
        return made

    def _reader(self, first: FirstPass) -> Model:
        """Make a second cache on the model's weights, for passes that end early."""
        planned, releasers, model = self.planned, self.releasers, self.model
        if self._onnx_attention is not None and isinstance(model, SwappedModel):
            attention = self._onnx_attention
            return load_onnx_reader(model, planned, attention, releasers, self._profiler)
        assert isinstance(model, GgufModel) and self.hook is not None, (
            "our kernels run in its graph"
        )
        return load_reader(model, planned, self.hook, first, releasers, self._profiler)

    def _loaded_speculator(self) -> Speculator | None:
        try:
            return load_speculator(self.planned, self.model, self.steering)
        except BaseException:
            self.close()
            raise

    def most_tokens(self) -> int:
        """Return how many tokens a prompt may have now: the context, or what the budget allows."""
        most = self.growth.most_tokens(self.model.context)
        return max(most, self.prompt_filter.most_tokens()) if self.prompt_filter else most

    def new_session(self) -> Session:
        """Return the session of the model's one cache."""
        return Session(
            self.model,
            self.steering,
            self.growth,
            self._profiler,
            prefixes=self.prefixes,
            prompt_filter=self.prompt_filter,
        )

    def run_facts(self) -> RunFacts:
        """Return what an answer's statistics tell of the model and its plan."""
        plan = self.planned.plan
        return RunFacts(
            budget_bytes=plan.budget.num_bytes,
            planned_bytes=plan.total_bytes,
            attention=self.planned.attention_in_words,
            packed_tensors=len(self.planned.spec.packed_tensors),
            unpacked_reason=self.unpacked_reason,
            hook_counts=self.hook_counts,
            watchdog=Watchdog(plan.budget.num_bytes, self.trim),
            speculator=self.speculator,
        )

    @property
    def hook(self) -> GraphHook | None:
        """Our kernels in llama.cpp's graph; None where llama.cpp's own run."""
        return self._callback if self.planned.policy.uses_hook else None

    def trim(self, level: str) -> Trim:
        """Give back what `level` allows; not during a pass. Raises `BadOption` for a level that is none."""
        return trim(self.releasers, level)

    def _try_passes(self) -> None:
        """Read weights once, so that a model whose graph is not as we know it is found out now."""
        self.steering.before_prompt()
        for num_rows in {1, min(2, self.planned.plan.max_rows)}:
            self.model.forward((0,) * num_rows)
            self.model.truncate(0)
        counts = self._callback.counts() if self._callback is not None else None
        if counts is not None and counts.packed_refused:
            self.close()
            raise LowtideError(
                f"{self.planned.spec.name} ({self.planned.spec.architecture}) reads packed weights in a "
                "way that our kernels do not know: leave --pack out"
            )

    def _kv_bytes(self, num_tokens: int) -> int:
        spec, plan = self.planned.spec, self.planned.plan
        groups = self.planned.policy.key_groups
        replaced = replaced_bytes(spec, groups, num_tokens, plan.max_rows, plan.kv_type)
        return kv_bytes(spec, num_tokens, plan.kv_type) - replaced

    def _first_layers_bytes(self, num_tokens: int) -> int:
        first = self.planned.policy.first_pass
        num_layers = first.num_layers if first else 0
        return first_layers_bytes(
            self.planned.spec, num_layers, num_tokens, self.planned.plan.kv_type
        )

    def check(self, options: GenerationOptions, *, is_completion: bool = False) -> None:
        """Raise `BadOption` where the policy cannot do what is asked."""
        policy = self.planned.policy
        if is_completion and isinstance(policy, Gem) and not policy.continues:
            raise BadOption(
                "gem keeps what a question attends to, and makes the continuation of a text worse: ask in "
                "a chat, or set gem:continues=1"
            )
        if options.explain and self.prompt_filter is None:
            raise BadOption(
                f"explain shows what gem kept of a prompt, attention is {policy.name}: open with "
                "attention='gem', or leave explain out"
            )

    @property
    def kernel_host(self) -> KernelHost | None:
        """Where our kernels run; None where the engine's own do."""
        return self._onnx_attention or self.hook

    def hook_counts(self) -> HookCounts | None:
        """Return what our kernels have done; None where the engine's own run."""
        ours = self.kernel_host
        return ours.counts() if ours is not None else None

    def has_room_to_tokenise(self, text_bytes: int, num_tokens: int) -> bool:
        """Whether a text can be tokenised while the cache holds `num_tokens`."""
        return tokenising_bytes(self.planned.spec, text_bytes) <= self.idle_bytes(num_tokens)

    def idle_bytes(self, num_tokens: int) -> int:
        """Return what of the plan nothing holds between prompts, while the cache holds `num_tokens`.

        The row for tokenising is there for that, and the memory that the cache does not use yet.
        """
        reserved = self.ledger.owners
        idle = reserved[PROMPT]
        if self.planned.host.kv_follows_use:
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
            scratch_bytes=lambda: getattr(self.hook_counts(), "scratch_bytes", 0),
            prefix_bytes=lambda: self.prefixes.num_bytes,
        )

    def _check_resident(self) -> None:
        """The plan's formulas are not measured for every architecture: hold them against the facts.

        The caches' cells are planned, and not yet touched.
        """
        plan, host = self.planned.plan, self.planned.host
        ahead = self.ledger.owners[CACHE] if host.kv_follows_use else 0
        if host.kv_follows_use and self.prompt_filter is not None:
            first = self._first_layers_bytes(plan.kv_tokens)
            # What is not kept lies where the cache is empty meanwhile.
            ahead = ahead + first if plan.keeps_first_pass else max(ahead, first)
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
        for owner in self.ledger.owners:
            self.ledger.release(owner)
