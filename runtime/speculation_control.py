"""SpeculationControl: whether to draft now, with which draft, and how many rows to verify.

Every proposal is compared with what came, whether it was verified or not: what a draft would have got
right is known without paying for it, and so speculation turns itself off and on again as the text has it.
Knows no model; times come from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowtide.memory.speculation_plan import expected_tokens
from lowtide.runtime.accept import Acceptance
from lowtide.runtime.drafts.draft import Draft, Proposal
from lowtide.runtime.pass_costs import PassCosts

LEAST_GAIN = 1.08
"""A verification has to promise so many times a plain step's throughput."""
WASTED_SHARE = 0.02
"""Of the time spent decoding, what proposals that come to nothing may take."""
FIRST_WASTE_S = 0.002
"""What they may take before anything is decoded."""
LOST_SHARE = 0.01
"""Of the time spent decoding, what verifications may have lost in all, whatever they promised."""
MOST_WATCHED = 3
"""Proposals of a draft that are compared with what comes at once, beside those that are verified."""
MOST_CREDIT_STEPS = 8
"""Gains of before stand for later losses up to so many plain steps."""


@dataclass(slots=True)
class _Watched:
    """A proposal that is being compared with what comes."""

    proposal: Proposal
    acceptance: Acceptance
    num_right: int = 0

    def is_open_after(self, token_id: int) -> bool:
        drafted = self.proposal.token_ids
        if drafted[self.num_right] != token_id:
            self.acceptance.count(self.num_right, 1)
            return False
        self.num_right += 1
        if self.num_right == len(drafted):
            self.acceptance.count(self.num_right, 0)
            return False
        return True


@dataclass(slots=True)
class _Record:
    """A draft with what is known of it."""

    draft: Draft
    classes: list[Acceptance]
    watched: list[_Watched] = field(default_factory=list)
    token_s: float = 0.0


class SpeculationControl:
    """Chooses for each step among `drafts` and numbers of rows up to those of `costs`."""

    def __init__(self, drafts: Sequence[Draft], costs: PassCosts) -> None:
        self.costs = costs
        positions = max(costs.most_rows - 1, 1)
        self._records = [
            _Record(
                draft,
                [Acceptance(positions, draft.prior(c)) for c in range(draft.num_classes)],
            )
            for draft in drafts
        ]
        self.best_promise: float | None = None
        """The most that any proposal has promised since `begin`, as a plain step's multiple."""
        self.wasted_s = self._useful_s = self._won_s = 0.0

    def begin(self) -> None:
        """A new answer begins; what was learned of the drafts stays."""
        self.best_promise = None
        for record in self._records:
            record.watched.clear()

    def passed(self, num_rows: int, seconds: float) -> None:
        """A pass took so long."""
        self._useful_s += seconds
        self.costs.observe(num_rows, seconds)

    def settled(self, num_tokens: int, seconds: float) -> None:
        """A verification is over: it took so long, and gave so many tokens. What it won or lost is kept."""
        plain_s = self.costs.of(1)
        won_s = self._won_s + num_tokens * plain_s - seconds
        self._won_s = min(won_s, MOST_CREDIT_STEPS * plain_s)

    @property
    def has_lost(self) -> bool:
        """Whether verifying has to wait until more was decoded without it."""
        return -self._won_s > LOST_SHARE * self._useful_s

    def came(self, token_id: int) -> None:
        """A token was chosen: proposals that were waiting for it are compared."""
        for record in self._records:
            record.watched = [w for w in record.watched if w.is_open_after(token_id)]

    def chosen(
        self, token_ids: Sequence[int], most_rows: int
    ) -> tuple[str, tuple[int, ...]] | None:
        """Return a draft's name and the tokens to verify after `token_ids`; None for a plain step."""
        most = min(most_rows, self.costs.most_rows) - 1
        if most < 1:
            return None
        best: tuple[float, str, tuple[int, ...]] = (LEAST_GAIN, "", ())
        for record in self._records:
            if not self._may_propose(record, most):
                continue
            before = self.costs.clock()
            proposal = self._proposed(record, token_ids, most)
            drafting_s = self.costs.clock() - before
            if not proposal.token_ids:
                self.wasted_s += drafting_s
                continue
            record.token_s += 0.1 * (drafting_s / len(proposal.token_ids) - record.token_s)
            gain, num_drafted = self._best_number(record, proposal)
            self.best_promise = max(gain, self.best_promise or 0.0)
            self._watch(record, proposal, always=gain > best[0] and not self.has_lost)
            if gain > best[0] and not self.has_lost:
                best = gain, record.draft.name, proposal.token_ids[:num_drafted]
            else:
                self.wasted_s += drafting_s
        return best[1:] if best[2] else None

    def _may_propose(self, record: _Record, most: int) -> bool:
        """Whether proposing pays, or there is time to waste on finding out."""
        if self.wasted_s <= FIRST_WASTE_S + WASTED_SHARE * self._useful_s:
            return True
        if record.draft.is_free:
            return False
        return self._best_gain(record, 0, most)[0] > LEAST_GAIN

    def _proposed(self, record: _Record, token_ids: Sequence[int], most: int) -> Proposal:
        """A draft that fails, or proposes nonsense, proposes nothing."""
        try:
            record.draft.follow(token_ids)
            proposal = record.draft.propose(most)
        except Exception:  # whatever a draft does, the answer goes on without it
            return Proposal()
        known = 0 <= proposal.sureness < len(record.classes)
        return proposal if known and len(proposal.token_ids) <= most else Proposal()

    def _best_number(self, record: _Record, proposal: Proposal) -> tuple[float, int]:
        return self._best_gain(record, proposal.sureness, len(proposal.token_ids))

    def _best_gain(self, record: _Record, sureness: int, most: int) -> tuple[float, int]:
        """Return what the best number of drafted tokens promises, and that number."""
        acceptance = record.classes[sureness].by_position()
        plain_s = self.costs.of(1)
        drafting_s = 0.0 if record.draft.is_free else record.token_s
        return max(
            (
                expected_tokens(acceptance, number)
                * plain_s
                / (self.costs.of(number + 1) + number * drafting_s),
                number,
            )
            for number in range(1, most + 1)
        )

    def _watch(self, record: _Record, proposal: Proposal, *, always: bool) -> None:
        if always or len(record.watched) < MOST_WATCHED:
            watched = _Watched(proposal, record.classes[proposal.sureness])
            record.watched.append(watched)
