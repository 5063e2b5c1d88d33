"""Makes room for several sequences inside the budget, and the sequences in it; gives both back.

Knows how a batch is planned, and nothing of its answers.

Plans a batch: first with as many drafts as may be of use, then with fewer, at last with none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.plan.batch import BatchPlan, plan_batch
from lowtide.memory.plan.estimates import KV_PADDING, kv_bytes
from lowtide.memory.plan.line import BATCH, CACHE
from lowtide.memory.units import OverBudget, format_bytes, format_bytes_up
from lowtide.models.model import Model, SequenceBatch
from lowtide.runtime.batch.batch import BatchPrompt, num_shared
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import ResolvedModel


class BatchMemory:
    """Room beside what a loaded model holds, or, where the budget has none, where its own cache would lie.

    `session` is the one of that cache: it gives up what it holds then.
    """

    def __init__(self, loaded: Engine, session: KVSession) -> None:
        self._loaded = loaded
        self._session = session
        self._agree: dict[int, bool] = {}
        self._open: SequenceBatch | None = None
        self._refused_before = 0

    def largest(self, plans: Sequence[BatchPlan]) -> BatchPlan:
        """Return the first that there is room for, the last in any case.

        The session's cache is given up only where the last one cannot do without.
        """
        ledger = self._loaded.ledger
        free_bytes = ledger.budget_bytes - ledger.reserved_bytes
        *larger, last = plans
        if last.num_bytes > free_bytes:
            free_bytes += self._grown_bytes() + self._lent_bytes()
        return next((plan for plan in larger if plan.num_bytes <= free_bytes), last)

    @contextlib.contextmanager
    def opened(self, plan: BatchPlan) -> Iterator[SequenceBatch]:
        """Yield the sequences, which are closed behind the block.

        Raises `OverBudget`, before anything is allocated, where there is no room for them.
        """
        self.close()
        self._reserve(plan)
        try:
            with guarded_aborts():
                model = self._loaded.model
                self._open = opened = model.open_sequences(
                    plan.num_sequences, plan.num_cells, plan.num_logits
                )
            self._refused_before = self._num_refused()
            if plan.num_sequences not in self._agree:
                self._loaded.controller.begin_prefill()
                self._agree[plan.num_sequences] = opened.rows_agree()
        except BaseException:
            self.close()
            self._loaded.ledger.release(BATCH)
            raise
        try:
            yield opened
        finally:
            if self._open is opened:
                self.close()

    def close(self) -> None:
        """Close the sequences that are open, also those of an answer that nobody reads on."""
        if self._open is None:
            return
        self._open.close()
        self._open = None
        self._loaded.ledger.release(BATCH)
        self._loaded.trim("background")

    def rows_agree(self, num_sequences: int) -> bool:
        """Whether rows of so many sequences were found to be what each is alone, when they were opened."""
        return self._agree[num_sequences]

    @property
    def cells_differ(self) -> bool:
        """Whether keys of the open sequences were found to lie elsewhere than they were taken to lie."""
        return self._num_refused() > self._refused_before

    def _num_refused(self) -> int:
        hook = self._loaded.hook
        return hook.layouts_refused if hook is not None else 0

    def _reserve(self, plan: BatchPlan) -> None:
        ledger = self._loaded.ledger
        try:
            ledger.reserve(BATCH, plan.num_bytes)
        except OverBudget:
            lent_bytes = self._lent_bytes()
            free_bytes = ledger.budget_bytes - ledger.reserved_bytes + self._grown_bytes()
            if plan.num_bytes > free_bytes + lent_bytes:
                raise self._no_room(plan, free_bytes + lent_bytes) from None
            self._session.evict()
            self._loaded.trim("background")
            # The rest lies where the cache is empty meanwhile.
            ledger.reserve(BATCH, max(plan.num_bytes - lent_bytes, 0))

    def _lent_bytes(self) -> int:
        """What the session's cache leaves free once it is empty: all but what is kept of it in any case."""
        planned = self._loaded.planned
        if not planned.baseline.kv_on_demand or planned.plan.gpus:
            return 0
        least_bytes = kv_bytes(planned.spec, KV_PADDING, planned.plan.kv_type)
        return max(self._planned_cache_bytes() - least_bytes, 0)

    def _planned_cache_bytes(self) -> int:
        rows = self._loaded.planned.plan.rows
        return next(row.num_bytes for row in rows if row.component == CACHE)

    def _grown_bytes(self) -> int:
        """What the cache has beyond its row, and gives back with its tokens."""
        return self._loaded.ledger.components[CACHE] - self._planned_cache_bytes()

    def _no_room(self, plan: BatchPlan, free_bytes: int) -> OverBudget:
        budget_bytes = self._loaded.ledger.budget_bytes
        return OverBudget(
            f"a batch of {plan.num_sequences} sequences, {plan.num_cells:,} tokens of KV cache in all, "
            f"takes {format_bytes_up(plan.num_bytes)} where {format_bytes(max(free_bytes, 0))} are free, "
            "and with what is loaded",
            budget_bytes + plan.num_bytes - free_bytes,
            budget_bytes,
            "lower max_tokens, ask fewer prompts at once, or raise --memory",
        )


MOST_DRAFTED = 32
"""Drafts of a pass beyond which more do not pay: rows cost more the more there are."""


def batch_plans(
    planned: ResolvedModel, model: Model, asked: Sequence[BatchPrompt]
) -> tuple[BatchPlan, ...]:
    """Return the plans for these prompts from the largest to the smallest, which drafts nothing."""
    shared = num_shared(asked)
    threads = planned.options.num_threads if planned.policy.uses_native_kernels else 0
    most_drafted = _most_drafted(planned, model, asked)
    choices = [most_drafted >> shift for shift in range(most_drafted.bit_length())]
    return tuple(
        plan_batch(
            planned.spec,
            planned.sizes,
            num_sequences=len(asked),
            shared_tokens=shared,
            own_tokens=sum(one.most_cells(model.context) - shared for one in asked),
            batch_size=model.batch_size,
            kv_type=planned.plan.kv_type,
            context=planned.plan.context,
            attention_threads=threads,
            most_drafted=number,
            speculation=planned.speculation,
        )
        for number in (*choices, 0)
    )


def why_not_drafted(planned: ResolvedModel, model: Model, asked: Sequence[BatchPrompt]) -> str:
    """Say why no pass of this batch verifies drafts, although that was asked for."""
    wish = planned.speculation
    if wish is not None and wish.draft_model is not None:
        return "a draft model follows one text: a batch drafts with ngram, trigram or auto"
    if planned.plan.verify_batch < 2:
        return "the plan has no room for it"
    if not _most_drafted(planned, model, asked):
        return "neither the passes nor the answers have room for drafts"
    return "the budget has no room for it beside the batch"


def _most_drafted(planned: ResolvedModel, model: Model, asked: Sequence[BatchPrompt]) -> int:
    """How many drafts a pass may verify: each answer's first token and its last are none."""
    wish = planned.speculation
    if wish is None or wish.draft_model is not None:
        return 0
    most_each = max(planned.plan.verify_batch - 1, 0)
    wanted = sum(
        min(max(one.most_cells(model.context) - len(one.prompt.token_ids) - 1, 0), most_each)
        for one in asked
    )
    return max(min(wanted, MOST_DRAFTED, model.batch_size - len(asked)), 0)
