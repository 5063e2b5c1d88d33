"""SpeculationController: what to draft and verify for N sequences; a single answer is N = 1.

Each sequence has drafts and acceptance rates of its own. Every proposal is compared with the tokens that are
sampled next, verified or not: so it is known at no cost how often a draft is right, and speculation turns itself
off and on again as the text changes. One pass verifies the drafts of all sequences; its time depends on its tokens
alone, so what is gained and lost is counted for all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.counts import AcceptanceCounts
from lowtide.runtime.speculation.drafts import NOTHING, Draft
from lowtide.runtime.speculation.proposal import (
    MIN_GAIN,
    DraftProposal,
    gain_alone,
    num_expected,
    share,
)
from lowtide.runtime.speculation.replanning import Replanner
from lowtide.runtime.speculation.sequence_drafts import SequenceDrafts
from lowtide.runtime.speculation.step_cost import StepCostModel
from lowtide.runtime.structured.answer import ConstrainedAnswer

LOST_SHARE = 0.005
"""Share of the decoding time that verifying may lose in all."""
FREE_LOSS_STEPS = 0.2
"""What an answer may lose before that, in passes without drafts: enough to find out whether drafts are right."""
MIN_MISS = 0.05
"""The least chance that is assumed for a pass in which no draft is right."""
MAX_CREDIT_STEPS = 8
"""Earlier gains of an answer make up for later losses up to the time of so many passes without drafts."""


class SpeculationController:
    """Chooses the drafts that each pass verifies, and learns from the tokens that are sampled.

    `drafts[i]` are those of sequence i. At most `max_draft` tokens of `vocabulary_size` are proposed for a
    sequence at once, and a pass has at most the tokens that `costs` was measured for. With `trees`, drafts may
    have branches. `nondeterminism` says why a greedy answer may differ from the plain loop's; None where it
    cannot. `off_reason` says why nothing is ever verified; drafts may still be watched. `promised` is the speed that
    the plan expects, relative to none drafted. `known` says how often drafts were right before. `counts` learns how
    often they are right now, and goes to `save` at the end. Between answers a `replanner` may change what is verified.
    """

    def __init__(
        self,
        drafts: Sequence[Sequence[Draft]],
        costs: StepCostModel,
        *,
        max_draft: int,
        vocabulary_size: int,
        trees: bool = False,
        nondeterminism: str | None = None,
        off_reason: str | None = None,
        promised: float | None = None,
        known: AcceptanceCounts | None = None,
        replanner: Replanner | None = None,
        save: Callable[[AcceptanceCounts], None] = lambda _: None,
    ) -> None:
        self.costs = costs
        self.counts = AcceptanceCounts()
        self.nondeterminism = nondeterminism
        self._drafts = tuple(tuple(some) for some in drafts)
        num_positions = max(costs.max_tokens - 1, 1)
        self._sequences = [
            SequenceDrafts(
                some,
                num_positions,
                vocabulary_size,
                self.counts,
                known or AcceptanceCounts(),
                trees=trees,
            )
            for some in self._drafts
        ]
        self._max_draft = max_draft
        self._off_reason = off_reason
        self._promised = promised
        self._replanner = replanner
        self._max_rows = costs.max_tokens
        self._save = save
        self._plain_s = self._spent_s = 0.0  # of this answer, without drafts and with them
        self._round: tuple[int, float] | None = None  # sequences and seconds of a pass with drafts
        self._credit_steps = FREE_LOSS_STEPS  # what may be lost, in passes without drafts

    @classmethod
    def off(cls, reason: str, num_sequences: int = 1) -> SpeculationController:
        """Return a controller that never drafts, for `reason`."""
        no_costs = StepCostModel(CostCurve(num_rows=(1,), seconds=(1.0,)))
        return cls(
            [()] * num_sequences, no_costs, max_draft=0, vocabulary_size=0, off_reason=reason
        )

    def begin(
        self,
        sequence: int = 0,
        answer: ConstrainedAnswer | None = None,
        *,
        is_first: bool = True,
    ) -> None:
        """Start an answer, which may be constrained; what was learned of drafts and costs stays.

        `is_first` says that no other answer runs: gains and losses are counted anew.
        """
        self._sequences[sequence].begin(answer)
        if is_first:
            self._round = None
            self._plain_s = self._spent_s = 0.0
            # No answer pays for what an earlier one won.
            self._credit_steps = min(self._credit_steps, FREE_LOSS_STEPS)
            self._replan()

    def _replan(self) -> None:
        """Verify in the next answers what the acceptance of the earlier ones makes worth its memory."""
        if self._replanner is None:
            return
        plan = self._replanner.between_turns(self.counts, self.costs.curve)
        if plan is None:
            return
        self._max_rows = plan.verify_batch
        if plan.verify_batch > 1:
            self._max_draft = plan.verify_batch - 1
        self._promised, self._off_reason = plan.promised, plan.reason
        for sequence in self._sequences:
            sequence.trees = plan.branches

    @property
    def _may_draft(self) -> bool:
        return self._max_draft > 0 and any(sequence.has_drafts for sequence in self._sequences)

    def propose(self, waiting: Sequence[tuple[int, Sequence[int], int]]) -> list[TokenTree]:
        """Return the drafts to verify in the next pass, an empty tree for none.

        Each of `waiting` is a sequence, its tokens, and how many drafts it has room for. A single answer takes
        the draft that promises the highest speed. In a batch each sequence offers the draft that promises the
        most tokens, and `share_rows` decides how many of each are verified.
        """
        if not self._may_draft:
            return [NOTHING] * len(waiting)
        before = self.costs.clock()
        proposals = [
            self._proposal(self._sequences[i], text, min(num_free, self._max_draft))
            for i, text, num_free in waiting
        ]
        if not any(proposals):
            self._spent_s += self.costs.clock() - before
            return [NOTHING] * len(waiting)
        shares = share(proposals, self.costs, self._max_rows)
        gain, most_rows = shares.gain or 0.0, self._most_rows(proposals)
        if len(waiting) + sum(shares.num_drafted) > most_rows:
            shares = share(proposals, self.costs, most_rows)
        trees = []
        for (i, _, _), proposal, num_rows in zip(
            waiting, proposals, shares.num_drafted, strict=True
        ):
            if proposal is not None:
                self._sequences[i].note_gain(gain)
            trees.append(self._sequences[i].take(proposal, num_rows))
        self._spent_s += self.costs.clock() - before
        return trees

    def _proposal(
        self, sequence: SequenceDrafts, text: Sequence[int], max_tokens: int
    ) -> DraftProposal | None:
        if len(self._sequences) > 1:
            return sequence.propose(text, max_tokens, self.costs, num_expected, 0.0)

        def gain(proposal: DraftProposal) -> float:
            found = gain_alone(proposal, self.costs)
            sequence.note_gain(found)
            return found

        min_gain = MIN_GAIN if self._credit_steps > 0 else float("inf")
        return sequence.propose(text, max_tokens, self.costs, gain, min_gain)

    def _most_rows(self, proposals: Sequence[DraftProposal | None]) -> int:
        """Return the tokens of the largest pass that the answer can bear to lose.

        What it loses if no draft is right counts by the chance of that, so a sure draft need not wait.
        """
        num_sequences = len(proposals)
        miss = max((1 - one.chances[0] for one in proposals if one is not None), default=1.0)
        plain_s, rows = self.costs.of(num_sequences), num_sequences
        bearable_s = plain_s * (1 + self._credit_steps / max(miss, MIN_MISS))
        while rows < self.costs.max_tokens and self.costs.of(rows + 1) <= bearable_s:
            rows += 1
        return rows

    def record_step(self, steps: Sequence[tuple[int, int]], seconds: float) -> None:
        """Record a decode pass: each sequence with the number of its drafts, and the pass's seconds."""
        if not self._may_draft:
            return
        self._spent_s += seconds
        num_sequences, num_drafted = len(steps), sum(number for _, number in steps)
        self._add_credit(LOST_SHARE)
        self.costs.observe(num_sequences + num_drafted, seconds, plain_rows=num_sequences)
        for i, number in steps:
            self._sequences[i].add_step(seconds / num_sequences)
            if number:
                self._sequences[i].record.add_verifying(seconds)
        self._round = (num_sequences, seconds) if num_drafted else None
        if not num_drafted:
            self._plain_s += seconds

    def observe_token(
        self, sequence: int, token_id: int, *, is_accepted: bool, on_branch: bool
    ) -> None:
        """Learn from a sampled token after which the sequence goes on; `is_accepted` if it was drafted."""
        drafts = self._sequences[sequence]
        drafts.observe_token(token_id)
        if is_accepted:
            drafts.record.add_accepted(on_branch=on_branch)

    def end_round(self, num_tokens: int) -> None:
        """Record that the last pass gave `num_tokens` tokens of all sequences, and what drafts gained or lost."""
        if self._round is None:
            return
        num_sequences, seconds = self._round
        plain_s = self.costs.of(num_sequences)
        self._plain_s += num_tokens / num_sequences * plain_s
        self._add_credit(num_tokens / num_sequences - seconds / max(plain_s, 1e-12))
        self._round = None

    def _add_credit(self, steps: float) -> None:
        self._credit_steps = min(self._credit_steps + steps, MAX_CREDIT_STEPS)

    def statistics(self, sequence: int) -> dict[str, Any]:
        """Return the values of `Statistics.speculation` for one sequence."""
        drafts = self._sequences[sequence]
        return {
            **drafts.record.to_dict(),
            "drafts": [draft.name for draft in self._drafts[sequence]],
            "draft_tokens": min(self._max_draft, self._max_rows - 1),
            "off_reason": self._why_off(drafts),
            "promised_speedup": self._promised,
            "measured_speedup": self._plain_s / self._spent_s if self._spent_s else None,
            "identical": self.nondeterminism is None,
            "nondeterminism": self.nondeterminism,
        }

    def _why_off(self, drafts: SequenceDrafts) -> str | None:
        if self._off_reason is not None or drafts.record.num_rounds:
            return self._off_reason
        if drafts.best_gain is None:
            return "no draft had a proposal"
        return (
            f"no proposal was expected to pay: the best promised {drafts.best_gain:.2f} times the speed of "
            "a pass without drafts"
        )

    def close(self) -> None:
        """Close the drafts and save what was counted. Closing twice is allowed."""
        self._save(self.counts)
        self._save = lambda _: None
        for draft in chain.from_iterable(self._drafts):
            draft.close()
