"""LoadedModel: a planned model in memory, with the attention that was asked for. Knows no prompt."""

from __future__ import annotations

import gc

from lowtide.attention.abort_guard import guarded_aborts
from lowtide.attention.graph_hook import GraphHook, HookCounts
from lowtide.attention.policy import Steering
from lowtide.memory.errors import OverBudget
from lowtide.memory.footprint import kv_cells, kv_row_bytes
from lowtide.memory.heap import trim_heap
from lowtide.memory.kv_pages import KvPages
from lowtide.memory.ledger import Ledger
from lowtide.memory.meter import read_process_memory
from lowtide.memory.releaser import Releaser, Trim, trim
from lowtide.memory.untouched_buffers import untouched_buffers
from lowtide.models.gguf_model import GgufModel, LoadOptions
from lowtide.models.model import Model
from lowtide.runtime.planning import PlannedModel


class LoadedModel:
    """Reserves the plan's rows and loads; `model` stands in for the planned file's.

    `hook` runs our kernels in llama.cpp's graph (None: llama.cpp's own run), `steering` is told of each
    pass. Raises `OverBudget` before anything is loaded where the plan does not fit, and after loading
    where the process is over it all the same. `releasers` are called, in order, to give memory back; the
    heap comes last, for what the others free.
    """

    def __init__(self, planned: PlannedModel, model: Model | None = None) -> None:
        planned.require_fit()
        self.planned = planned
        self.ledger = Ledger(planned.plan.budget.num_bytes)
        for row in planned.plan.rows:
            self.ledger.reserve(row.owner, row.num_bytes)
        self.hook: GraphHook | None = None
        self.releasers: list[Releaser] = []
        if model is None:
            threads = planned.options.num_threads
            self.hook = GraphHook(threads) if planned.policy.uses_hook else None
            try:
                model = _load_gguf(planned, self.hook, self.releasers)
            except BaseException:
                if self.hook is not None:
                    self.hook.close()
                raise
        self.model = model
        self.steering = Steering()
        if self.hook is not None:
            self.steering = planned.policy.install(self.hook, planned.spec)
        self.releasers += (Releaser("moderate", gc.collect), Releaser("background", trim_heap))
        self._check_resident()

    def trim(self, level: str) -> Trim:
        """Give back what `level` allows; not during a pass. Raises `BadOption` for a level that is none."""
        return trim(self.releasers, level)

    def hook_counts(self) -> HookCounts | None:
        """Return what our kernels have done; None where llama.cpp's own run."""
        return self.hook.counts() if self.hook is not None else None

    def _check_resident(self) -> None:
        """The plan's formulas are not measured for every architecture: hold them against the facts."""
        peak = read_process_memory().peak_bytes
        budget = self.planned.plan.budget.num_bytes
        if peak > budget:
            self.close()
            raise OverBudget(f"{self.planned.spec.name}, loaded,", peak, budget, "raise --memory")

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self.model.close()
        if self.hook is not None:
            self.hook.close()
        for owner in self.ledger.owners:
            self.ledger.release(owner)


def _load_gguf(
    planned: PlannedModel, hook: GraphHook | None, releasers: list[Releaser]
) -> GgufModel:
    options = LoadOptions(
        context=planned.plan.context,
        max_rows=planned.plan.max_rows,
        threads=planned.options.num_threads,
        kv_type=planned.plan.kv_type,
        memory_map=planned.plan.memory_map,
        eval_callback=hook.callback if hook else None,
    )
    with guarded_aborts(), untouched_buffers() as buffers:
        model = GgufModel(planned.spec, options)
    row_bytes = kv_row_bytes(planned.spec, planned.plan.kv_type)
    if row_bytes is not None:
        pages = KvPages(
            buffers,
            num_tensors=2 * planned.spec.num_layers,
            num_cells=kv_cells(planned.plan.context),
            row_bytes=row_bytes,
        )
        model.on_cut = pages.cut
        releasers.append(Releaser("background", lambda: pages.trim(model.num_tokens)))
    return model
