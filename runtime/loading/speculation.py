"""Makes the speculation controller that a plan has room for, for one answer or for a batch."""

from __future__ import annotations

from functools import partial

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.attention.policy import PassController
from lowtide.memory.budget import Ledger
from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.estimates import padded_context
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.memory.plan.speculation.choices import DRAFT_BATCH_SIZE, SpeculationConfig
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model, SequenceBatch, SingleSequence
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.loading.logits_memory import LogitsMemory
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.speculation.counts import AcceptanceCounts, add_to_file, file_name
from lowtide.runtime.speculation.drafts import (
    Draft,
    ModelDraft,
    NgramDraft,
    TrigramDraft,
    require_same_tokens,
)
from lowtide.runtime.speculation.replanning import Replanner
from lowtide.runtime.speculation.step_cost import StepCostModel, benchmark_steps
from lowtide.runtime.speculation.worth import draft_share, known_counts, placed_key

WATCHED_TOKENS = 7
"""Drafts of a proposal that is compared with the text but not verified."""
DRAFT_CLASSES: dict[str, type[NgramDraft] | type[TrigramDraft]] = {
    "ngram": NgramDraft,
    "trigram": TrigramDraft,
}


def load_speculation(
    planned: ResolvedModel, model: Model, controller: PassController, ledger: Ledger
) -> SpeculationController | None:
    """Return the controller of single answers; None where speculation is off.

    Measures what a pass costs by its tokens where that is unknown: the model's cache must be empty. Between turns,
    memory of logits that no longer pays goes back to `ledger` and to the system. Raises `BadOption` where a draft
    model's vocabulary is not the model's.
    """
    config = planned.speculation
    if config is None:
        return None
    verify_batch = min(planned.plan.verify_batch, model.max_verify_batch)
    if planned.plan.verify_batch >= 2 > verify_batch:
        return SpeculationController.off(
            f"the graph of {planned.spec.name} computes the logits of a pass's last token only"
            + ("" if planned.policy.uses_native_kernels else "; open with attention='dense'")
        )
    if not planned.plan.verify_batch:
        return SpeculationController.off(_why_off(planned))
    if controller.correction_interval is not None:
        return SpeculationController.off(
            f"the correction of {planned.policy.name} computes decoded tokens again"
        )
    save = partial(add_to_file, _counts_name(planned, config))
    vocabulary_size = planned.spec.vocabulary.num_tokens
    if verify_batch < 2:
        return SpeculationController(
            [_drafts(planned, model)],
            StepCostModel(CostCurve(num_rows=(1,), seconds=(1.0,))),
            max_draft=WATCHED_TOKENS,
            vocabulary_size=vocabulary_size,
            off_reason=_why_off(planned),
            save=save,
        )
    steps = benchmark_steps(model, verify_batch, steps_key(planned, config))
    table, known = planned.plan.speculation, known_counts(planned.spec, config.draft_model)
    return SpeculationController(
        [_drafts(planned, model)],
        StepCostModel(steps.costs),
        max_draft=verify_batch - 1,
        vocabulary_size=vocabulary_size,
        trees=planned.plan.branches and model.verifies_trees,
        nondeterminism=planned.backend.verification_nondeterminism(
            planned, rows_agree=steps.rows_agree
        ),
        promised=table.chosen.speed_up if table and table.chosen else None,
        known=known,
        replanner=_replanner(planned, config, model, known, ledger),
        save=save,
    )


def _replanner(
    planned: ResolvedModel,
    config: SpeculationConfig,
    model: Model,
    known: AcceptanceCounts,
    ledger: Ledger,
) -> Replanner | None:
    """Return what weighs the choices again between turns; None where the plan chose none of them."""
    table, draft = planned.plan.speculation, config.draft_model
    if table is None or table.chosen is None:
        return None
    memory = LogitsMemory(
        model,
        ledger,
        planned_rows=table.chosen.choice.verify_batch,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
    )
    return Replanner(
        table.points,
        table.chosen,
        known,
        token_share=draft_share(planned.spec, draft),
        may_watch=draft is None,
        resize=memory.keep,
    )


def _why_off(planned: ResolvedModel) -> str:
    table = planned.plan.speculation
    return table.reason if table is not None else "the plan has no room for it"


def _counts_name(planned: ResolvedModel, config: SpeculationConfig) -> str:
    draft = config.draft_model
    return file_name(planned.spec.fingerprint, draft.fingerprint if draft else "")


def load_batch_speculation(
    planned: ResolvedModel, plan: BatchPlan, sequences: SequenceBatch, controller: PassController
) -> tuple[SpeculationController, bool]:
    """Return the controller of a batch, and whether tokens have the same logits in any of its passes.

    Measures what a pass costs where that is unknown: the sequences must be empty.
    """
    controller.begin_decode()
    assert planned.speculation is not None, "speculation is off"
    key = f"{steps_key(planned, planned.speculation)} among sequences"
    steps = benchmark_steps(SingleSequence(sequences), plan.num_logits, key)
    speculation = SpeculationController(
        [_free_drafts(planned) for _ in range(plan.num_sequences)],
        StepCostModel(steps.costs),
        max_draft=planned.plan.verify_batch - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
        known=known_counts(planned.spec, None),
        save=partial(add_to_file, _counts_name(planned, planned.speculation)),
    )
    return speculation, steps.rows_agree


def _drafts(planned: ResolvedModel, model: Model) -> list[Draft]:
    config = planned.speculation
    if config is not None and config.draft_model is not None:
        return [_draft_model(planned, config.draft_model, model)]
    return _free_drafts(planned)


def _free_drafts(planned: ResolvedModel) -> list[Draft]:
    return [DRAFT_CLASSES[name]() for name in planned.plan.drafts]


def _draft_model(planned: ResolvedModel, spec: ModelSpec, model: Model) -> ModelDraft:
    options = LoadOptions(
        context=padded_context(planned.plan.kv_tokens),
        batch_size=DRAFT_BATCH_SIZE,
        threads=planned.options.num_threads,
        memory_map=False,
    )
    with guarded_aborts():
        draft = GgufModel(spec, options)
    try:
        num_tokens = planned.spec.vocabulary.num_tokens
        require_same_tokens(draft.tokenizer, model.tokenizer, num_tokens, spec.name)
    except BaseException:
        draft.close()
        raise
    return ModelDraft(draft)


def steps_key(planned: ResolvedModel, config: SpeculationConfig) -> str:
    """Return everything that the cost of a pass depends on."""
    plan = planned.plan
    gpus = [(gpu.device.name, gpu.num_layers) for gpu in plan.gpus]
    return placed_key(config.costs_key, plan.kv_type, plan.resident_layers, gpus)
