"""BatchSpeculation: shares a pass out among the answers of a batch, for what is drafted for each.

One pass verifies the drafts of all. What it costs depends on its rows, whoever they are of; whether they
were worth it is kept for all together. Knows no model and no text.

SequenceSpeculation: what is drafted for one answer of a batch, and what became of it.

Has drafts and a control of its own, as acceptance is the answer's own. Knows no other member and no costs.

Makes the speculation of a batch whose sequences were just opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowtide.attention.policy import PassController
from lowtide.memory.plan.batch import BatchPlan, share_rows
from lowtide.models.model import SequenceBatch, SingleSequence
from lowtide.runtime.loading.speculation import FREE_DRAFTS, passes_key
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.speculation.acceptance import SpeculationRecord
from lowtide.runtime.speculation.control import (
    LEAST_GAIN,
    LOST_SHARE,
    MOST_CREDIT_STEPS,
    DraftProposal,
    SpeculationControl,
)
from lowtide.runtime.speculation.drafts import Draft
from lowtide.runtime.speculation.options import SpeculationArg
from lowtide.runtime.speculation.step_cost import StepCostModel, benchmark_steps

if TYPE_CHECKING:
    from lowtide.runtime.batch.batch import BatchSequence


class SequenceSpeculation:
    """Offers drafts before each pass, and is told how many of them are verified.

    At most `most_drafted` tokens are offered, of a vocabulary of `vocabulary_size`.
    """

    def __init__(
        self,
        drafts: Sequence[Draft],
        control: SpeculationControl,
        *,
        most_drafted: int,
        vocabulary_size: int,
    ) -> None:
        self._drafts = tuple(drafts)
        self._control = control
        self._most_drafted = most_drafted
        self._vocabulary_size = vocabulary_size
        self._offer: DraftProposal | None = None
        self._best_promise: float | None = None
        self._record = SpeculationRecord()

    def take_proposal(self, text: Sequence[int], num_free: int) -> Sequence[float]:
        """Return what is believed of each token proposed after `text`, which has room for `num_free`."""
        clock = self._control.costs.clock
        before = clock()
        offer = self._control.take_proposal(text, min(num_free, self._most_drafted))
        self._record.drafting(clock() - before)
        if offer is not None and not all(0 <= t < self._vocabulary_size for t in offer.token_ids):
            self._control.reject_proposal(offer)
            offer = None
        self._offer = offer
        return offer.expected if offer is not None else ()

    def taken(self, num_drafted: int, expected_tokens: float | None) -> tuple[int, ...]:
        """Return so many tokens of the offer to verify; `expected_tokens` is what the best pass would gain."""
        if self._offer is None:
            return ()
        self._best_promise = max(expected_tokens or 0.0, self._best_promise or 0.0)
        if not num_drafted:
            self._control.reject_proposal(self._offer)
            return ()
        drafted = self._offer.token_ids[:num_drafted]
        self._record.drafted(self._offer.draft, len(drafted))
        return drafted

    def passed(self, seconds: float, *, num_members: int, has_drafts: bool) -> None:
        """A pass of so many members took so long; what drafting may waste is a share of this one's part."""
        self._control.shared(seconds / num_members)
        if has_drafts:
            self._record.verified(seconds)

    def observe_token(self, token_id: int, *, is_accepted: bool) -> None:
        """A token was chosen, and the answer goes on; `is_accepted` where it was drafted."""
        self._control.observe_token(token_id)
        if is_accepted:
            self._record.accepted(on_branch=False)

    def statistics(self, not_identical: str | None) -> dict[str, Any]:
        """Return the documented values of `stats.speculation`, `not_identical` as its reason."""
        return {
            **self._record.to_dict(),
            "drafts": [draft.name for draft in self._drafts],
            "off_reason": self._off_reason(),
            "identical": not_identical is None,
            "nondeterminism": not_identical,
        }

    def _off_reason(self) -> str | None:
        if self._record.num_rounds:
            return None
        if self._best_promise is None:
            return "no draft had anything to propose"
        return f"no proposal promised to pay: the best, {self._best_promise:.2f} x a pass without drafts"

    def close(self) -> None:
        """Close the drafts; closing twice is allowed."""
        for draft in self._drafts:
            draft.close()


class BatchSpeculation:
    """Chooses before each pass how many rows each of `members`, by index, gets for its drafts.

    A pass has at most the rows of `costs`. `rows_agree` says whether a row was found to be what it is alone
    among so many.
    """

    def __init__(
        self, members: Sequence[SequenceSpeculation], costs: StepCostModel, *, rows_agree: bool
    ) -> None:
        self.members = tuple(members)
        self.rows_agree = rows_agree
        self._costs = costs
        self._passing: Sequence[BatchSequence] = ()
        self._started_at = self._pass_s = 0.0
        self._decoded_s = self._won_s = 0.0

    def draft(self, active: Sequence[BatchSequence]) -> None:
        """Set what is verified for each in the pass that comes now, which computes one token of each."""
        offered = [
            self.members[member.index].take_proposal(member.text, member.num_free)
            for member in active
        ]
        shares = share_rows(
            offered, self._costs.of, most_rows=self._costs.most_rows, least_gain=LEAST_GAIN
        )
        for member, num_drafted in zip(active, shares.num_drafted, strict=True):
            number = 0 if self._has_lost else num_drafted
            member.drafted = self.members[member.index].taken(number, shares.gain)
        self._passing = tuple(active)
        self._started_at = self._costs.clock()

    def passed(self) -> None:
        """The pass is over: its time goes into the costs, and each answer has its share of it."""
        self._pass_s = self._costs.clock() - self._started_at
        self._decoded_s += self._pass_s
        num_plain = len(self._passing)
        num_rows = num_plain + sum(len(member.drafted) for member in self._passing)
        self._costs.observe(num_rows, self._pass_s, plain_rows=num_plain)
        for member in self._passing:
            self.members[member.index].passed(
                self._pass_s, num_members=num_plain, has_drafts=bool(member.drafted)
            )

    def end_round(self, num_tokens: int) -> None:
        """All answers together have so many tokens of the pass: what verifying won or lost is kept.

        Gains of before stand for later losses up to `MOST_CREDIT_STEPS` passes without drafts.
        """
        if not any(member.drafted for member in self._passing):
            return
        plain_s = self._costs.of(len(self._passing))
        won_s = self._won_s + num_tokens / len(self._passing) * plain_s - self._pass_s
        self._won_s = min(won_s, MOST_CREDIT_STEPS * plain_s)

    def close(self) -> None:
        """Close the drafts; closing twice is allowed."""
        for member in self.members:
            member.close()

    @property
    def _has_lost(self) -> bool:
        """Whether verifying has to wait until more was decoded without it."""
        return -self._won_s > LOST_SHARE * self._decoded_s


def load_batch_speculation(
    planned: ResolvedModel, plan: BatchPlan, sequences: SequenceBatch, controller: PassController
) -> BatchSpeculation | None:
    """Return what drafts for each sequence and shares passes out; None where the plan drafts nothing.

    Measures what a pass costs by its rows, where that is not known; no sequence has tokens then.
    """
    if not plan.most_drafted:
        return None
    controller.begin_decode()
    key = f"{passes_key(planned)} among sequences"
    passes = benchmark_steps(SingleSequence(sequences), plan.num_logits, key)
    costs = StepCostModel(passes.costs)
    members = [_member(planned, costs) for _ in range(plan.num_sequences)]
    return BatchSpeculation(members, costs, rows_agree=passes.rows_agree)


def _member(planned: ResolvedModel, costs: StepCostModel) -> SequenceSpeculation:
    names = SpeculationArg.parse(planned.options.speculate).drafts
    drafts: list[Draft] = [FREE_DRAFTS[name]() for name in names]
    return SequenceSpeculation(
        drafts,
        SpeculationControl(drafts, costs),
        most_drafted=planned.plan.verify_batch - 1,
        vocabulary_size=planned.spec.vocabulary.num_tokens,
    )
