"""LoadedModel: a planned model in memory, with the attention that was asked for. Knows no prompt."""

from __future__ import annotations

from lowtide.attention.abort_guard import guarded_aborts
from lowtide.attention.graph_hook import GraphHook, HookCounts
from lowtide.attention.policy import Steering
from lowtide.memory.errors import OverBudget
from lowtide.memory.footprint import kv_bytes, kv_cells, kv_row_bytes
from lowtide.memory.kv_pages import KvPages
from lowtide.memory.ledger import Ledger
from lowtide.memory.meter import read_process_memory
from lowtide.memory.untouched_buffers import untouched_buffers
from lowtide.models.errors import LowtideError
from lowtide.models.gguf_model import GgufModel, LoadOptions
from lowtide.models.model import Model
from lowtide.runtime.memory_watch import WatchedModel
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.profiler import SILENT, Profiler


class LoadedModel:
    """Reserves the plan's rows and loads; `model` stands in for the planned file's.

    `hook` runs our kernels in llama.cpp's graph (None: llama.cpp's own run), `steering` is told of each
    pass, `profiler` of what is loaded. Raises `OverBudget` before anything is loaded where the plan does
    not fit, and after loading where the process is over it all the same.
    """

    def __init__(
        self, planned: PlannedModel, model: Model | None = None, profiler: Profiler = SILENT
    ) -> None:
        planned.require_fit()
        self.planned = planned
        self.ledger = Ledger(planned.plan.budget.num_bytes)
        for row in planned.plan.rows:
            self.ledger.reserve(row.owner, row.num_bytes)
        self.hook: GraphHook | None = None
        self._profiler = profiler
        profiler.watch(planned, self._watched())
        if model is None:
            with profiler.span("libraries"):
                self.hook = _make_hook(planned, profiler)
            try:
                model = _load_gguf(planned, self.hook, profiler)
            except BaseException:
                if self.hook is not None:
                    self.hook.close()
                raise
        self.model = model
        profiler.count_tokens(lambda: model.num_tokens)
        self.steering = Steering()
        if self.hook is not None:
            self.steering = planned.policy.install(self.hook, planned.spec)
        self._check_resident()

    def hook_counts(self) -> HookCounts | None:
        """Return what our kernels have done; None where llama.cpp's own run."""
        return self.hook.counts() if self.hook is not None else None

    def _watched(self) -> WatchedModel:
        """What a profiler may ask of the model, while it is loaded and later."""
        spec, plan = self.planned.spec, self.planned.plan
        return WatchedModel(
            paths=spec.paths,
            file_bytes=spec.file_bytes,
            memory_map=plan.memory_map,
            cache_bytes=kv_bytes(spec, plan.context, plan.kv_type),
            scratch_bytes=lambda: self.hook.counts().scratch_bytes if self.hook else 0,
        )

    def _check_resident(self) -> None:
        """The plan's formulas are not measured for every architecture: hold them against the facts."""
        peak = read_process_memory().peak_bytes
        budget = self.planned.plan.budget.num_bytes
        if peak > budget:
            self.close()
            raise OverBudget(f"{self.planned.spec.name}, loaded,", peak, budget, "raise --memory")

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self._profiler.finish()
        self.model.close()
        if self.hook is not None:
            self.hook.close()
            self.hook = None
        for owner in self.ledger.owners:
            self.ledger.release(owner)


def _make_hook(planned: PlannedModel, profiler: Profiler) -> GraphHook | None:
    """Our attention needs a hook, and so does the time of layers, which can be gone without."""
    threads, num_layers = planned.options.num_threads, planned.spec.num_layers
    if not planned.policy.uses_hook and not profiler.wants_layers:
        return None
    try:
        hook = GraphHook(threads)
    except LowtideError:
        if planned.policy.uses_hook:
            raise
        return None
    hook.set_active(planned.policy.uses_hook)
    profiler.time_layers(hook, num_layers)
    return hook


def _load_gguf(planned: PlannedModel, hook: GraphHook | None, profiler: Profiler) -> GgufModel:
    options = LoadOptions(
        context=planned.plan.context,
        max_rows=planned.plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=planned.plan.kv_type,
        memory_map=planned.plan.memory_map,
        eval_callback=hook.callback if hook else None,
        stage=profiler.span,
    )
    with guarded_aborts(), untouched_buffers() as buffers:
        model = GgufModel(planned.spec, options)
    profiler.cache_lies_in(buffers)
    row_bytes = kv_row_bytes(planned.spec, planned.plan.kv_type)
    if row_bytes is not None:
        model.on_cut = KvPages(
            buffers,
            num_tensors=2 * planned.spec.num_layers,
            num_cells=kv_cells(planned.plan.context),
            row_bytes=row_bytes,
        ).cut
    return model
