"""BatchGenerator: several prompts at once, in memory that is there for this batch alone."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from lowtide.memory.plan.batch import MAX_SEQUENCES
from lowtide.models.errors import BadOption
from lowtide.runtime.arguments import checked_all
from lowtide.runtime.batch.memory import BatchMemory, batch_plans, why_not_drafted
from lowtide.runtime.batch.open_batch import open_batch
from lowtide.runtime.batch.particles import ParticleFilter
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import GenerationRequest, GenerationState
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.together import require_together
from lowtide.runtime.profiling.profiler import Profiler

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
        require_together(self._engine.planned, f"a batch of {num_prompts} prompts")
        most = min(self._engine.model.batch_size, MAX_SEQUENCES)
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
        reason = why_not_drafted(engine.planned, engine.model, requests)
        with open_batch(engine, memory, plan, self._profiler, reason) as batch:
            if _are_particles(requests):
                particles = ParticleFilter(
                    batch.loop,
                    lambda key, one: GenerationState(key, one, engine.model, batch.context),
                    requests,
                    requests[0].params.seed,
                )
                yield from particles.run(engine.model.tokenizer)
                return
            for index, request in enumerate(requests):
                batch.loop.add(GenerationState(index, request, engine.model, batch.context))
            for key, chunk in batch.loop.run():
                batch.mark_if_slots_differ()
                assert isinstance(key, int), "the keys are the indices of the requests"
                yield key, chunk


def _are_particles(requests: Sequence[GenerationRequest]) -> bool:
    """Whether the requests are one prompt and constraint, drawn with weights."""
    first = requests[0]
    return len(requests) > 1 and all(
        one.answer is not None
        and one.params.sampling == "awrs"
        and one.params.constraint == first.params.constraint
        and list(one.token_ids) == list(first.token_ids)
        for one in requests
    )


def params_of_each(
    prompts: Sequence[str], params: ParamsOfAll, named: dict[str, Any]
) -> list[SamplingParams]:
    """Return the parameters of each prompt; raises `BadOption` where the arguments do not fit each other."""
    each = checked_all(params, len(prompts))
    if each is None:
        one_for_all: Any = params
        return [SamplingParams.of(one_for_all, **named)] * len(prompts)
    return [SamplingParams.of(one, **named) for one in each]
