"""Plans a batch: first with as many drafts as may be of use, then with fewer, at last with none."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.memory.batch_plan import BatchPlan, plan_batch
from lowtide.models.model import Model
from lowtide.runtime.batch import num_shared
from lowtide.runtime.batch_member import BatchPrompt
from lowtide.runtime.planning import PlannedModel

MOST_DRAFTED = 32
"""Drafts of a pass beyond which more do not pay: rows cost more the more there are."""


def batch_plans(
    planned: PlannedModel, model: Model, asked: Sequence[BatchPrompt]
) -> tuple[BatchPlan, ...]:
    """Return the plans for these prompts from the largest to the smallest, which drafts nothing."""
    shared = num_shared(asked)
    threads = planned.options.num_threads if planned.policy.uses_hook else 0
    most_drafted = _most_drafted(planned, model, asked)
    choices = [most_drafted >> shift for shift in range(most_drafted.bit_length())]
    return tuple(
        plan_batch(
            planned.spec,
            planned.sizes,
            num_sequences=len(asked),
            shared_tokens=shared,
            own_tokens=sum(one.most_cells(model.context) - shared for one in asked),
            max_rows=model.max_rows,
            kv_type=planned.plan.kv_type,
            context=planned.plan.context,
            attention_threads=threads,
            most_drafted=number,
            speculation=planned.speculation,
        )
        for number in (*choices, 0)
    )


def why_not_drafted(planned: PlannedModel, model: Model, asked: Sequence[BatchPrompt]) -> str:
    """Say why no pass of this batch verifies drafts, although that was asked for."""
    wish = planned.speculation
    if wish is not None and wish.draft_model is not None:
        return "a draft model follows one text: a batch drafts with ngram, trigram or auto"
    if planned.plan.verified_rows < 2:
        return "the plan has no room for it"
    if not _most_drafted(planned, model, asked):
        return "neither the passes nor the answers have room for drafts"
    return "the budget has no room for it beside the batch"


def _most_drafted(planned: PlannedModel, model: Model, asked: Sequence[BatchPrompt]) -> int:
    """How many drafts a pass may verify: each answer's first token and its last are none."""
    wish = planned.speculation
    if wish is None or wish.draft_model is not None:
        return 0
    most_each = max(planned.plan.verified_rows - 1, 0)
    wanted = sum(
        min(max(one.most_cells(model.context) - len(one.prompt.token_ids) - 1, 0), most_each)
        for one in asked
    )
    return max(min(wanted, MOST_DRAFTED, model.max_rows - len(asked)), 0)
