"""BatchGenerator: several prompts at once, one forward pass for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.line import BATCH
from lowtide.models.errors import BadOption
from lowtide.models.model import SequenceBatch
from lowtide.runtime.arguments import checked_all
from lowtide.runtime.batch.memory import BatchMemory, batch_plans, why_not_drafted
from lowtide.runtime.generation.generate import generate
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import (
    GenerationContext,
    GenerationRequest,
    GenerationState,
)
from lowtide.runtime.kv.batch import BatchKV
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.loading.speculation import load_batch_speculation
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import Profiler
from lowtide.runtime.speculation.controller import SpeculationController

MAX_SEQUENCES = 256
"""Sequences that one llama.cpp context can have."""
SLOTS_DIFFER = "llama.cpp stores keys of this model in other slots than those of other models"
ParamsOfAll = SamplingParams | Sequence[SamplingParams] | None


class BatchGenerator:
    """Generates for several requests in memory beside the loaded model, inside the budget.

    `session` is the model's own KV cache, which is evicted where its memory is needed.
    """

    def __init__(self, engine: Engine, session: KVSession, profiler: Profiler) -> None:
        self._engine = engine
        self._profiler = profiler
        self._memory = BatchMemory(engine, session)

    @property
    def is_open(self) -> bool:
        """Whether a batch holds memory."""
        return self._memory.is_open

    def close(self) -> None:
        """Release the memory of a batch that is still read; it cannot go on."""
        self._memory.close()

    def check(self, num_prompts: int) -> None:
        """Raise `BadOption` where the model or its attention runs one sequence at a time, or for too many."""
        model, policy = self._engine.model, self._engine.planned.policy
        if not model.supports_batch:
            raise BadOption(
                f"{model.spec.name} cannot run a batch of {num_prompts} prompts: it computes one sequence at "
                f"a time ({_why_alone(self._engine)}); pass one prompt after another"
            )
        if not policy.supports_batch:
            raise BadOption(
                f"{policy.name} cannot run a batch of {num_prompts} prompts: it selects or filters the keys "
                "of one sequence; open with attention='dense' or 'llama', or pass one prompt after another"
            )
        most = min(model.batch_size, MAX_SEQUENCES)
        if num_prompts > most:
            raise BadOption(
                f"a batch of {num_prompts} prompts is more than the {most} tokens of a pass; pass fewer at "
                "once" + (", or raise batch_size" if most < MAX_SEQUENCES else "")
            )

    def generate(
        self, requests: Sequence[GenerationRequest]
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        """Yield the chunks of all requests as they come, as pairs of the request's index and the chunk.

        Raises `OverBudget`, before anything is allocated, where the memory is not there.
        """
        if not requests:
            return
        engine, memory = self._engine, self._memory
        plan = memory.choose(batch_plans(engine.planned, engine.model, requests))
        with contextlib.ExitStack() as stack:
            sequences = stack.enter_context(memory.open(plan))
            speculation, rows_agree = self._speculation(plan, sequences, requests)
            if speculation is not None:
                stack.callback(speculation.close)
            context = self._context(plan, speculation, rows_agree=rows_agree)
            cache = BatchKV(
                sequences,
                [request.max_kv_tokens(engine.model.context) for request in requests],
                plan.shared_tokens,
                engine.controller,
                self._profiler,
            )
            states = [
                GenerationState(index, request, engine.model, context)
                for index, request in enumerate(requests)
            ]
            for index, chunk in generate(cache, states, context, self._profiler):
                if memory.slots_differ:
                    _mark_nondeterministic(context.batch, chunk.stats.speculation)
                yield index, chunk

    def _speculation(
        self, plan: BatchPlan, sequences: SequenceBatch, requests: Sequence[GenerationRequest]
    ) -> tuple[SpeculationController | None, bool]:
        engine, rows_agree = self._engine, self._memory.rows_agree(plan.num_sequences)
        if engine.planned.speculation is None:
            return None, rows_agree
        if not plan.max_drafted:
            reason = why_not_drafted(engine.planned, engine.model, requests)
            return SpeculationController.off(reason, plan.num_sequences), rows_agree
        speculation, drafts_agree = load_batch_speculation(
            engine.planned, plan, sequences, engine.controller
        )
        rows_agree = rows_agree and drafts_agree
        speculation.nondeterminism = self._nondeterminism(rows_agree=rows_agree)
        return speculation, rows_agree

    def _context(
        self, plan: BatchPlan, speculation: SpeculationController | None, *, rows_agree: bool
    ) -> GenerationContext:
        alone, reason = (
            self._engine.generation_context(),
            self._nondeterminism(rows_agree=rows_agree),
        )
        return replace(
            alone,
            speculation=speculation,
            planned_bytes=alone.planned_bytes + self._engine.ledger.components[BATCH],
            batch={
                "sequences": plan.num_sequences,
                "shared_tokens": plan.shared_tokens,
                "kv_tokens": plan.num_kv_tokens,
                "num_bytes": plan.num_bytes,
                "identical": reason is None,
                "nondeterminism": reason,
            },
        )

    def _nondeterminism(self, *, rows_agree: bool) -> str | None:
        """Return why a greedy answer may differ from that of its prompt alone; None where it cannot."""
        engine = self._engine
        return engine.planned.backend.batch_nondeterminism(
            engine.planned,
            rows_agree=rows_agree,
            exact_prefill=engine.controller.exact_prefill,
        )


def _mark_nondeterministic(*stats: dict[str, Any] | None) -> None:
    for values in stats:
        if values is not None:
            values.update(identical=False, nondeterminism=SLOTS_DIFFER)


def params_of_each(
    prompts: Sequence[str], params: ParamsOfAll, named: dict[str, Any]
) -> list[SamplingParams]:
    """Return the parameters of each prompt; raises `BadOption` where the arguments do not fit each other."""
    each = checked_all(params, len(prompts))
    if each is None:
        one_for_all: Any = params
        return [SamplingParams.of(one_for_all, **named)] * len(prompts)
    return [SamplingParams.of(one, **named) for one in each]


def _why_alone(engine: Engine) -> str:
    if engine.planned.plan.gpus:
        return "some of its layers are on a GPU"
    if engine.planned.spec.recurrent_state_bytes:
        return "its recurrent state cannot be shared"
    return f"{engine.planned.spec.engine} runs it that way"
