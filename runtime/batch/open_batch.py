"""Opens a planned batch: the sequences in their memory, what drafts for them, and the loop that computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.line import BATCH
from lowtide.models.model import SequenceBatch
from lowtide.runtime.batch.memory import BatchMemory
from lowtide.runtime.generation.loop import DecodeLoop
from lowtide.runtime.generation.pace import PromptPace
from lowtide.runtime.generation.state import GenerationContext
from lowtide.runtime.kv.batch import BatchKV
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.loading.speculation import load_batch_speculation
from lowtide.runtime.profiling.profiler import Profiler
from lowtide.runtime.speculation.controller import SpeculationController

SLOTS_DIFFER = "llama.cpp stores keys of this model in other slots than those of other models"


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """The loop over a batch, its cache, and what the statistics of its answers say."""

    loop: DecodeLoop
    cache: BatchKV
    context: GenerationContext
    memory: BatchMemory

    def mark_if_slots_differ(self) -> None:
        """Say in the statistics that answers may differ, where a pass attended to other slots than expected."""
        if not self.memory.slots_differ:
            return
        reason = {"identical": False, "nondeterminism": SLOTS_DIFFER}
        if self.context.batch is not None:
            self.context.batch.update(reason)
        if self.context.speculation is not None:
            self.context.speculation.nondeterminism = SLOTS_DIFFER


@contextlib.contextmanager
def open_batch(
    engine: Engine,
    memory: BatchMemory,
    plan: BatchPlan,
    profiler: Profiler,
    why_not_drafted: str,
    pace: PromptPace | None = None,
) -> Iterator[OpenBatch]:
    """Open the sequences of a plan for a block; `why_not_drafted` is said where speculation is on and drafts nothing.

    With `pace`, reading prompts does not delay the other answers for long.
    Raises `OverBudget`, before anything is allocated, where there is no room.
    """
    with contextlib.ExitStack() as stack:
        sequences = stack.enter_context(memory.open(plan))
        speculation, rows_agree = _speculation(engine, memory, plan, sequences, why_not_drafted)
        if speculation is not None:
            stack.callback(speculation.close)
        cache = BatchKV(sequences, plan.num_sequences, engine.controller, profiler)
        context = _context(engine, plan, sequences, speculation, rows_agree=rows_agree)
        yield OpenBatch(DecodeLoop(cache, context, profiler, pace), cache, context, memory)


def _speculation(
    engine: Engine,
    memory: BatchMemory,
    plan: BatchPlan,
    sequences: SequenceBatch,
    why_not_drafted: str,
) -> tuple[SpeculationController | None, bool]:
    rows_agree = memory.rows_agree(plan)
    if engine.planned.speculation is None:
        return None, rows_agree
    if not plan.max_drafted:
        return SpeculationController.off(why_not_drafted, plan.num_sequences), rows_agree
    speculation, drafts_agree = load_batch_speculation(
        engine.planned, plan, sequences, engine.controller
    )
    rows_agree = rows_agree and drafts_agree
    speculation.nondeterminism = _nondeterminism(engine, rows_agree=rows_agree)
    return speculation, rows_agree


def _context(
    engine: Engine,
    plan: BatchPlan,
    sequences: SequenceBatch,
    speculation: SpeculationController | None,
    *,
    rows_agree: bool,
) -> GenerationContext:
    alone, reason = engine.generation_context(), _nondeterminism(engine, rows_agree=rows_agree)
    is_planned = engine.planned.plan.batch is not None
    beside_bytes = 0 if is_planned else engine.ledger.components[BATCH]
    return replace(
        alone,
        speculation=speculation,
        planned_bytes=alone.planned_bytes + beside_bytes,
        max_tokens=min(alone.max_tokens, sequences.num_slots),
        batch={
            "sequences": plan.num_sequences,
            "kv_tokens": plan.num_kv_tokens,
            "num_bytes": plan.num_bytes,
            "identical": reason is None,
            "nondeterminism": reason,
        },
    )


def _nondeterminism(engine: Engine, *, rows_agree: bool) -> str | None:
    """Return why a greedy answer may differ from that of its prompt alone; None where it cannot."""
    return engine.planned.backend.batch_nondeterminism(
        engine.planned,
        rows_agree=rows_agree,
        exact_prefill=engine.controller.exact_prefill,
    )
