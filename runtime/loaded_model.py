"""LoadedModel: a planned model in memory, with the attention that was asked for. Knows no prompt."""

from __future__ import annotations

import gc

from lowtide.attention.gem import Gem
from lowtide.attention.graph_hook import GraphHook, HookCounts
from lowtide.attention.policy import Steering
from lowtide.memory.errors import OverBudget
from lowtide.memory.footprint import kv_bytes, tokenising_bytes
from lowtide.memory.heap import trim_heap
from lowtide.memory.kv_growth import KvGrowth
from lowtide.memory.ledger import Ledger
from lowtide.memory.meter import read_process_memory
from lowtide.memory.owners import CACHE, PREFIXES, PROMPT
from lowtide.memory.releaser import Releaser, Trim, trim
from lowtide.memory.units import format_bytes
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.model import Model
from lowtide.runtime.generate import RunFacts
from lowtide.runtime.gguf_loading import load_gguf
from lowtide.runtime.memory_watch import WatchedModel
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.prefix_cache import PrefixCache
from lowtide.runtime.profiler import SILENT, Profiler
from lowtide.runtime.prompt_filter import PromptFilter
from lowtide.runtime.session import Session
from lowtide.runtime.watchdog import Watchdog


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
        self._profiler = profiler
        self.prefixes = PrefixCache(self.ledger.owners.get(PREFIXES, 0))
        self.releasers = [Releaser("moderate", self.prefixes.clear)]
        profiler.watch(planned, self._watched())
        if model is None:
            with profiler.span("libraries"):
                self._callback = _graph_hook(planned, profiler)
            try:
                model = load_gguf(planned, self._callback, self.releasers, profiler)
            except BaseException:
                if self._callback is not None:
                    self._callback.close()
                raise
        self.model = model
        profiler.count_tokens(lambda: model.num_tokens)
        self.steering = Steering()
        if self.hook is not None:
            self.steering = planned.policy.install(self.hook, planned.spec)
        self.prompt_filter: PromptFilter | None = None
        if self.hook is not None and isinstance(planned.policy, Gem):
            self.prompt_filter = PromptFilter(model, self.hook, planned.policy)
        self.growth = KvGrowth(self.ledger, planned.plan.kv_tokens, self._kv_bytes)
        if planned.plan.kept_layers is not None:
            self._try_a_pass()
        self.releasers += (Releaser("moderate", gc.collect), Releaser("background", trim_heap))
        self._check_resident()

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
            attention=str(self.planned.policy),
            hook_counts=self.hook_counts,
            watchdog=Watchdog(plan.budget.num_bytes, self.trim),
        )

    @property
    def hook(self) -> GraphHook | None:
        """Our kernels in llama.cpp's graph; None where llama.cpp's own run."""
        return self._callback if self.planned.policy.uses_hook else None

    def trim(self, level: str) -> Trim:
        """Give back what `level` allows; not during a pass. Raises `BadOption` for a level that is none."""
        return trim(self.releasers, level)

    def _try_a_pass(self) -> None:
        """Read weights once, so that a model whose graph is not as we know it is found out now."""
        self.steering.before_prompt()
        self.model.forward((0,))
        self.model.truncate(0)

    def _kv_bytes(self, num_tokens: int) -> int:
        return kv_bytes(self.planned.spec, num_tokens, self.planned.plan.kv_type)

    def check_completion(self) -> None:
        """Raise `BadOption` where a text is to be continued by a policy that is for questions."""
        policy = self.planned.policy
        if isinstance(policy, Gem) and not policy.continues:
            raise BadOption(
                "gem keeps what a question attends to, and makes the continuation of a text worse: ask in "
                "a chat, or set gem:continues=1"
            )

    def hook_counts(self) -> HookCounts | None:
        """Return what our kernels have done; None where llama.cpp's own run."""
        return self.hook.counts() if self.hook is not None else None

    def has_room_to_tokenise(self, text_bytes: int, num_tokens: int) -> bool:
        """Whether a text can be tokenised while the cache holds `num_tokens`.

        The row for it is there for that, and the memory that the cache does not use yet.
        """
        reserved = self.ledger.owners
        room = reserved[PROMPT]
        if self.planned.host.kv_follows_use:
            room += reserved[CACHE] - self._kv_bytes(num_tokens)
        return tokenising_bytes(text_bytes) <= room

    def _watched(self) -> WatchedModel:
        """What a profiler may ask of the model, while it is loaded and later."""
        spec, plan = self.planned.spec, self.planned.plan
        return WatchedModel(
            paths=spec.paths,
            file_bytes=spec.file_bytes,
            memory_map=plan.memory_map,
            cache_bytes=kv_bytes(spec, plan.context, plan.kv_type) - plan.gpu_cache_bytes,
            scratch_bytes=lambda: self.hook.counts().scratch_bytes if self.hook else 0,
            prefix_bytes=lambda: self.prefixes.num_bytes,
        )

    def _check_resident(self) -> None:
        """The plan's formulas are not measured for every architecture: hold them against the facts.

        The cache's cells are planned, and not yet touched.
        """
        plan, host = self.planned.plan, self.planned.host
        ahead = self.ledger.owners[CACHE] if host.kv_follows_use else 0
        needed = read_process_memory().peak_bytes + ahead
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
        self.model.close()
        if self._callback is not None:
            self._callback.close()
            self._callback = None
        for owner in self.ledger.owners:
            self.ledger.release(owner)


def _graph_hook(planned: PlannedModel, profiler: Profiler) -> GraphHook | None:
    """Our attention needs a hook, and so does giving weights back; times of layers can be gone without."""
    is_needed = planned.policy.uses_hook or planned.plan.kept_layers is not None
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
