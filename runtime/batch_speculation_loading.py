"""Makes the speculation of a batch whose sequences were just opened."""

from __future__ import annotations

from lowtide.attention.policy import Steering
from lowtide.memory.batch_plan import BatchPlan
from lowtide.models.sequences import Sequences
from lowtide.models.single_sequence import SingleSequence
from lowtide.runtime.batch_speculation import BatchSpeculation
from lowtide.runtime.drafts.draft import Draft
from lowtide.runtime.member_speculation import MemberSpeculation
from lowtide.runtime.pass_costs import PassCosts, measured_passes
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.speculation_choice import SpeculationChoice
from lowtide.runtime.speculation_control import SpeculationControl
from lowtide.runtime.speculator_loading import FREE_DRAFTS, passes_key


def load_batch_speculation(
    planned: PlannedModel, plan: BatchPlan, sequences: Sequences, steering: Steering
) -> BatchSpeculation | None:
    """Return what drafts for each sequence and shares passes out; None where the plan drafts nothing.

    Measures what a pass costs by its rows, where that is not known; no sequence has tokens then.
    """
    if not plan.most_drafted:
        return None
    steering.before_decode()
    key = f"{passes_key(planned)} among sequences"
    passes = measured_passes(SingleSequence(sequences), plan.num_wanted, key)
    costs = PassCosts(passes.costs)
    members = [_member(planned, costs) for _ in range(plan.num_sequences)]
    return BatchSpeculation(members, costs, rows_agree=passes.rows_agree)


def _member(planned: PlannedModel, costs: PassCosts) -> MemberSpeculation:
    names = SpeculationChoice.parse(planned.options.speculate).drafts
    drafts: list[Draft] = [FREE_DRAFTS[name]() for name in names]
    return MemberSpeculation(
        drafts,
        SpeculationControl(drafts, costs),
        most_drafted=planned.plan.verified_rows - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
    )
