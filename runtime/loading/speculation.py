"""Makes the speculation controller that a plan has room for, for one answer or for a batch."""

from __future__ import annotations

import platform

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.attention.policy import PassController
from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.estimates import padded_context
from lowtide.memory.plan.speculation import DRAFT_BATCH_SIZE
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model, SequenceBatch, SingleSequence
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.speculation.drafts import (
    Draft,
    ModelDraft,
    NgramDraft,
    TrigramDraft,
    require_same_tokens,
)
from lowtide.runtime.speculation.options import SpeculationArg
from lowtide.runtime.speculation.step_cost import StepCostModel, benchmark_steps

DRAFT_CLASSES: dict[str, type[NgramDraft] | type[TrigramDraft]] = {
    "ngram": NgramDraft,
    "trigram": TrigramDraft,
}


def load_speculation(
    planned: ResolvedModel, model: Model, controller: PassController
) -> SpeculationController | None:
    """Return the controller of single answers; None where speculation is off.

    Measures what a pass costs by its tokens where that is unknown: the model's cache must be empty. Raises
    `BadOption` where a draft model's vocabulary is not the model's.
    """
    if planned.speculation is None:
        return None
    verify_batch = min(planned.plan.verify_batch, model.max_verify_batch)
    if planned.plan.verify_batch >= 2 > verify_batch:
        return SpeculationController.off(
            f"the graph of {planned.spec.name} computes the logits of a pass's last token only"
            + ("" if planned.policy.uses_native_kernels else "; open with attention='dense'")
        )
    if verify_batch < 2:
        return SpeculationController.off("the plan has no room for it")
    if controller.correction_interval is not None:
        return SpeculationController.off(
            f"the correction of {planned.policy.name} computes decoded tokens again"
        )
    steps = benchmark_steps(model, verify_batch, steps_key(planned))
    return SpeculationController(
        [_drafts(planned, model)],
        StepCostModel(steps.costs),
        max_draft=verify_batch - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
        trees=model.verifies_trees,
        nondeterminism=planned.backend.verification_nondeterminism(
            planned, rows_agree=steps.rows_agree
        ),
    )


def load_batch_speculation(
    planned: ResolvedModel, plan: BatchPlan, sequences: SequenceBatch, controller: PassController
) -> tuple[SpeculationController, bool]:
    """Return the controller of a batch, and whether tokens have the same logits in any of its passes.

    Measures what a pass costs where that is unknown: the sequences must be empty.
    """
    controller.begin_decode()
    key = f"{steps_key(planned)} among sequences"
    steps = benchmark_steps(SingleSequence(sequences), plan.num_logits, key)
    speculation = SpeculationController(
        [_free_drafts(planned) for _ in range(plan.num_sequences)],
        StepCostModel(steps.costs),
        max_draft=planned.plan.verify_batch - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
    )
    return speculation, steps.rows_agree


def _drafts(planned: ResolvedModel, model: Model) -> list[Draft]:
    config = planned.speculation
    if config is not None and config.draft_model is not None:
        return [_draft_model(planned, config.draft_model, model)]
    return _free_drafts(planned)


def _free_drafts(planned: ResolvedModel) -> list[Draft]:
    names = SpeculationArg.parse(planned.options.speculate).drafts
    return [DRAFT_CLASSES[name]() for name in names]


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


def steps_key(planned: ResolvedModel) -> str:
    """Return everything that the cost of a pass depends on."""
    spec, plan = planned.spec, planned.plan
    parts = (
        spec.fingerprint, sorted(spec.tensor_types), spec.weight_bytes, platform.node(),
        platform.machine(), planned.options.num_threads, planned.policy, plan.kv_type,
        plan.resident_layers, len(spec.repacked_tensors),
        [(gpu.device.name, gpu.num_layers) for gpu in plan.gpus], spec.engine, planned.options.provider,
    )  # fmt: skip
    return " ".join(map(str, parts))
