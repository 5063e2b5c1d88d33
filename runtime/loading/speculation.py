"""Makes the speculator that a plan has room for, beside a model that was just loaded."""

from __future__ import annotations

import platform

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.attention.policy import PassController
from lowtide.memory.plan.estimates import padded_context
from lowtide.memory.plan.speculation import DRAFT_PASS_ROWS
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.speculation.control import SpeculationControl
from lowtide.runtime.speculation.drafts import (
    Draft,
    ModelDraft,
    NgramDraft,
    TrigramDraft,
    require_same_tokens,
)
from lowtide.runtime.speculation.options import SpeculationArg
from lowtide.runtime.speculation.speculator import Speculator
from lowtide.runtime.speculation.step_cost import StepCostModel, benchmark_steps

FREE_DRAFTS: dict[str, type[NgramDraft] | type[TrigramDraft]] = {
    "ngram": NgramDraft,
    "trigram": TrigramDraft,
}


def load_speculator(
    planned: ResolvedModel, model: Model, controller: PassController
) -> Speculator | None:
    """Return what drafts and verifies; None where nothing was asked for.

    Measures what a pass costs by its rows, where that is not known; the model's cache is empty then.
    Raises `BadOption` where a draft model's vocabulary is not the model's.
    """
    if planned.speculation is None:
        return None
    num_rows = min(planned.plan.verify_batch, model.max_verify_batch)
    if planned.plan.verify_batch >= 2 > num_rows:
        return Speculator.without(
            f"the graph of {planned.spec.name} makes logits of a pass's last row alone"
            + ("" if planned.policy.uses_native_kernels else ": open with attention='dense'")
        )
    if num_rows < 2:
        return Speculator.without("the plan has no room for it")
    if controller.correction_interval is not None:
        return Speculator.without(
            f"{planned.policy.name}'s correction computes decoded tokens again"
        )
    passes = benchmark_steps(model, num_rows, passes_key(planned))
    drafts = _drafts(planned, model)
    return Speculator(
        drafts,
        SpeculationControl(drafts, StepCostModel(passes.costs), branches=model.verifies_trees),
        most_rows=num_rows,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
        not_identical=planned.backend.verification_nondeterminism(
            planned, rows_agree=passes.rows_agree
        ),
    )


def _drafts(planned: ResolvedModel, model: Model) -> list[Draft]:
    wish = planned.speculation
    if wish is not None and wish.draft_model is not None:
        return [_draft_model(planned, wish.draft_model, model)]
    names = SpeculationArg.parse(planned.options.speculate).drafts
    return [FREE_DRAFTS[name]() for name in names]


def _draft_model(planned: ResolvedModel, spec: ModelSpec, model: Model) -> ModelDraft:
    options = LoadOptions(
        context=padded_context(planned.plan.kv_tokens),
        batch_size=DRAFT_PASS_ROWS,
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


def passes_key(planned: ResolvedModel) -> str:
    """Return everything that the cost of a pass depends on."""
    spec, plan = planned.spec, planned.plan
    parts = (
        spec.fingerprint, sorted(spec.tensor_types), spec.weight_bytes, platform.node(),
        platform.machine(), planned.options.num_threads, planned.policy, plan.kv_type,
        plan.resident_layers, len(spec.repacked_tensors),
        [(gpu.device.name, gpu.num_layers) for gpu in plan.gpus], spec.engine, planned.options.provider,
    )  # fmt: skip
    return " ".join(map(str, parts))
