"""BatchMemory: plans the memory of a batch, reserves it inside the budget, and opens the sequences in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.plan.batch import MAX_DRAFTED, BatchPlan, plan_batch
from lowtide.memory.plan.estimates import KV_PADDING, kv_bytes, padded_context
from lowtide.memory.plan.line import BATCH, CACHE
from lowtide.memory.units import OverBudget, format_bytes, format_bytes_up
from lowtide.models.arguments.names import option
from lowtide.models.model import Model, SequenceBatch
from lowtide.models.text.tokenizer import common_prefix
from lowtide.runtime.generation.state import GenerationRequest
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import ResolvedModel


class BatchMemory:
    """Memory beside the loaded model; where the budget has none, that of the model's own KV cache.

    `session` holds that cache, and evicts it then.
    """

    def __init__(self, engine: Engine, session: KVSession) -> None:
        self._engine = engine
        self._session = session
        self._rows_agree: dict[int, bool] = {}
        self._sequences: SequenceBatch | None = None
        self._refused_before = 0

    @property
    def is_open(self) -> bool:
        """Whether sequences are open."""
        return self._sequences is not None

    def choose(self, plans: Sequence[BatchPlan]) -> BatchPlan:
        """Return the first plan that there is room for; the last one in any case.

        Memory of the model's own cache counts only where the last plan does not fit without it.
        """
        ledger = self._engine.ledger
        free_bytes = ledger.budget_bytes - ledger.reserved_bytes
        *larger, last = plans
        if last.num_bytes > free_bytes:
            free_bytes += self._grown_bytes() + self._lendable_bytes()
        with_room = (plan for plan in larger if plan.num_bytes <= free_bytes)
        return next((plan for plan in with_room if self._full_device(plan) is None), last)

    @contextlib.contextmanager
    def open(self, plan: BatchPlan) -> Iterator[SequenceBatch]:
        """Yield the sequences, which are closed after the block.

        Raises `OverBudget`, before anything is allocated, where there is no room for them.
        """
        self.close()
        self._reserve(plan)
        try:
            with guarded_aborts():
                model = self._engine.model
                self._sequences = opened = model.open_sequences(
                    plan.num_held, plan.num_kv_tokens, plan.num_logits
                )
            self._refused_before = self._num_refused()
            if plan.num_held not in self._rows_agree:
                self._engine.controller.begin_prefill()
                self._rows_agree[plan.num_held] = opened.rows_agree()
        except BaseException:
            self.close()
            self._engine.ledger.release(BATCH)
            raise
        try:
            yield opened
        finally:
            if self._sequences is opened:
                self.close()

    def close(self) -> None:
        """Close the sequences, also those of a batch that is not read to its end, and release their memory."""
        if self._sequences is None:
            return
        self._sequences.close()
        self._sequences = None
        self._engine.ledger.release(BATCH)
        self._engine.trim("background")

    def rows_agree(self, plan: BatchPlan) -> bool:
        """Return whether a token among the sequences of a plan has the logits that it has alone."""
        return self._rows_agree[plan.num_held]

    @property
    def slots_differ(self) -> bool:
        """Whether llama.cpp stored keys of the open sequences in other slots than expected."""
        return self._num_refused() > self._refused_before

    def _num_refused(self) -> int:
        hook = self._engine.hook
        return hook.layouts_refused if hook is not None else 0

    def _full_device(self, plan: BatchPlan) -> OverBudget | None:
        """Return the error of a device that has no room for the batch's KV cache and compute buffer."""
        planned = self._engine.planned
        share = plan.num_kv_tokens / padded_context(planned.plan.context)
        logits_bytes = 4 * planned.spec.vocabulary.num_tokens * plan.num_logits
        for gpu in planned.plan.gpus:
            needed = gpu.total_bytes + gpu.second_context_bytes(share, logits_bytes)
            if needed > gpu.budget_bytes:
                return OverBudget(
                    f"a batch of {plan.num_sequences} sequences beside the model on {gpu.device.name}",
                    needed,
                    gpu.budget_bytes,
                    f"pass fewer prompts at once, or ask for fewer {option('gpu_layers')}",
                )
        return None

    def _reserve(self, plan: BatchPlan) -> None:
        full = self._full_device(plan)
        if full is not None:
            raise full
        ledger = self._engine.ledger
        try:
            ledger.reserve(BATCH, plan.num_bytes)
        except OverBudget:
            lendable_bytes = self._lendable_bytes()
            free_bytes = ledger.budget_bytes - ledger.reserved_bytes + self._grown_bytes()
            if plan.num_bytes > free_bytes + lendable_bytes:
                raise self._no_room(plan, free_bytes + lendable_bytes) from None
            self._session.evict()
            self._engine.trim("background")
            # The rest of the batch lies in memory that the model's own cache does not use meanwhile.
            ledger.reserve(BATCH, max(plan.num_bytes - lendable_bytes, 0))

    def _lendable_bytes(self) -> int:
        """Return what the model's own cache leaves free once it is empty: all but its first tokens."""
        planned = self._engine.planned
        if not planned.baseline.kv_on_demand or planned.plan.gpus:
            return 0
        min_bytes = kv_bytes(planned.spec, KV_PADDING, planned.plan.kv_type)
        return max(self._planned_cache_bytes() - min_bytes, 0)

    def _planned_cache_bytes(self) -> int:
        lines = self._engine.planned.plan.rows
        return next(line.num_bytes for line in lines if line.component == CACHE)

    def _grown_bytes(self) -> int:
        """Return what the model's own cache has beyond its plan, and releases with its tokens."""
        return self._engine.ledger.components[CACHE] - self._planned_cache_bytes()

    def _no_room(self, plan: BatchPlan, free_bytes: int) -> OverBudget:
        budget_bytes = self._engine.ledger.budget_bytes
        return OverBudget(
            f"a batch of {plan.num_sequences} sequences with {plan.num_kv_tokens:,} tokens of KV cache in all "
            f"takes {format_bytes_up(plan.num_bytes)} where {format_bytes(max(free_bytes, 0))} are free, "
            "and with what is loaded",
            budget_bytes + plan.num_bytes - free_bytes,
            budget_bytes,
            f"lower {option('max_tokens')}, pass fewer prompts at once, or raise {option('memory')}",
        )


def batch_plans(
    planned: ResolvedModel, model: Model, requests: Sequence[GenerationRequest]
) -> tuple[BatchPlan, ...]:
    """Return plans for a batch from the most drafts that may be of use, by halves, to none."""
    shared = num_shared(requests)
    threads = planned.options.num_threads if planned.policy.uses_native_kernels else 0
    max_drafted = _max_drafted(planned, model, requests)
    choices = [max_drafted >> shift for shift in range(max_drafted.bit_length())]
    return tuple(
        plan_batch(
            planned.spec,
            planned.sizes,
            num_sequences=len(requests),
            shared_tokens=shared,
            own_tokens=sum(one.max_kv_tokens(model.context) - shared for one in requests),
            batch_size=model.batch_size,
            kv_type=planned.plan.kv_type,
            context=planned.plan.context,
            attention_threads=threads,
            max_drafted=number,
            speculation=planned.speculation,
            drafts=planned.plan.drafts,
        )
        for number in (*choices, 0)
    )


def num_shared(requests: Sequence[GenerationRequest]) -> int:
    """Return how many tokens all prompts begin with; each has one more, whose logits are needed."""
    first, *others = (request.token_ids for request in requests)
    if not others:
        return 0
    shared = min(common_prefix(first, other) for other in others)
    return max(min(shared, *(len(request.token_ids) - 1 for request in requests)), 0)


def why_not_drafted(
    planned: ResolvedModel, model: Model, requests: Sequence[GenerationRequest]
) -> str:
    """Return why a batch verifies no drafts although speculation is on."""
    config = planned.speculation
    if config is not None and config.draft_model is not None:
        return "a draft model follows one sequence; a batch drafts with ngram, trigram or auto"
    if not model.batch_truncates:
        return "the model's recurrent state cannot drop a rejected draft"
    if planned.plan.verify_batch < 2:
        return "the plan has no room for it"
    if not _max_drafted(planned, model, requests):
        return "neither the passes nor the answers have room for drafts"
    return "the budget has no room for it beside the batch"


def _max_drafted(
    planned: ResolvedModel, model: Model, requests: Sequence[GenerationRequest]
) -> int:
    """Return how many drafts a pass may verify: the first and the last token of an answer are none."""
    config = planned.speculation
    if config is None or config.draft_model is not None or not model.batch_truncates:
        return 0
    max_each = max(planned.plan.verify_batch - 1, 0)
    useful = sum(
        min(max(one.max_kv_tokens(model.context) - len(one.token_ids) - 1, 0), max_each)
        for one in requests
    )
    return max(min(useful, MAX_DRAFTED, model.batch_size - len(requests)), 0)
