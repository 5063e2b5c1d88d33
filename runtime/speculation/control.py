"""SpeculationControl: whether to draft now, with which draft, and how many rows to verify.

Every proposal is compared with what came, whether it was verified or not: what a draft would have got
right is known without paying for it, and so speculation turns itself off and on again as the text has it.
Knows no model; times come from outside.

Offer: what is proposed for one answer, for whoever shares a pass out among several. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowtide.memory.plan.speculation import expected_tokens
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.acceptance import Acceptance, chances
from lowtide.runtime.speculation.drafts import NOTHING, Draft, Proposal
from lowtide.runtime.speculation.step_cost import StepCostModel


@dataclass(frozen=True, slots=True)
class DraftProposal:
    """A draft's proposal, which took `drafting_s` seconds; `acceptance` is what is believed by position."""

    draft: str
    token_ids: tuple[int, ...]
    acceptance: Sequence[float]
    drafting_s: float

    @property
    def expected_tokens(self) -> float:
        """How many tokens come of verifying all of it, on average, one that is no draft among them."""
        return expected_tokens(self.acceptance, len(self.token_ids))

    @property
    def expected(self) -> Sequence[float]:
        """What is believed of each proposed token, where those before it came."""
        return self.acceptance[: len(self.token_ids)]


LEAST_GAIN = 1.08
"""A verification has to promise so many times a plain step's throughput."""
WASTED_SHARE = 0.01
"""Of the time spent decoding, what proposals that come to nothing may take."""
FIRST_WASTE_S = 0.001
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

    tree: TokenTree
    path: tuple[int, ...]
    acceptance: Acceptance
    num_right: int = 0

    def is_open_after(self, token_id: int) -> bool:
        row = self.path[self.num_right]
        if self.tree.token_ids[row] != token_id:
            self.acceptance.count(self.num_right, 1)
            self._count_others(row, token_id)
            return False
        self.num_right += 1
        if self.num_right == len(self.path):
            self.acceptance.count(self.num_right, 0)
            return False
        return True

    def _count_others(self, row: int, token_id: int) -> None:
        for other in self.tree.later_siblings(row):
            is_right = self.tree.token_ids[other] == token_id
            self.acceptance.count_other(is_right=is_right)
            if is_right:
                return


@dataclass(slots=True)
class _Record:
    """A draft with what is known of it."""

    draft: Draft
    classes: list[Acceptance]
    watched: list[_Watched] = field(default_factory=list)
    token_s: float = 0.0


class SpeculationControl:
    """Chooses for each step among `drafts` and numbers of rows up to those of `costs`.

    Without `branches`, of what a draft proposes only its likeliest chain is taken.
    """

    def __init__(
        self, drafts: Sequence[Draft], costs: StepCostModel, *, branches: bool = False
    ) -> None:
        self.costs = costs
        self._branches = branches
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

    def end_round(self, num_tokens: int, seconds: float) -> None:
        """A verification is over: it took so long, and gave so many tokens. What it won or lost is kept."""
        plain_s = self.costs.of(1)
        won_s = self._won_s + num_tokens * plain_s - seconds
        self._won_s = min(won_s, MOST_CREDIT_STEPS * plain_s)

    @property
    def has_lost(self) -> bool:
        """Whether verifying has to wait until more was decoded without it."""
        return -self._won_s > LOST_SHARE * self._useful_s

    def observe_token(self, token_id: int) -> None:
        """A token was chosen: proposals that were waiting for it are compared."""
        for record in self._records:
            record.watched = [w for w in record.watched if w.is_open_after(token_id)]

    def chosen(self, token_ids: Sequence[int], most_rows: int) -> tuple[str, TokenTree] | None:
        """Return a draft's name and what to verify after `token_ids`; None for a plain step.

        It is the best of trees each of which is the one before with the next likeliest token.
        """
        most = min(most_rows, self.costs.most_rows) - 1
        if most < 1:
            return None
        best = LEAST_GAIN, "", NOTHING
        for record in self._records:
            if not self._may_propose(record, most):
                continue
            before = self.costs.clock()
            proposal = self._proposed(record, token_ids, most)
            drafting_s = self.costs.clock() - before
            path = proposal.tree.first_path()
            if not path:
                self.wasted_s += drafting_s
                continue
            record.token_s += 0.1 * (drafting_s / len(path) - record.token_s)
            acceptance = record.classes[proposal.confidence]
            gain, tree = self._best_tree(record, acceptance, proposal.tree, most)
            self.best_promise = max(gain, self.best_promise or 0.0)
            is_best = gain > best[0] and not self.has_lost
            if is_best or len(record.watched) < MOST_WATCHED:
                record.watched.append(_Watched(proposal.tree, path, acceptance))
            if is_best:
                best = gain, record.draft.name, tree
            else:
                self.wasted_s += self.costs.clock() - before
        return best[1:] if best[1] else None

    def take_proposal(self, token_ids: Sequence[int], most_tokens: int) -> DraftProposal | None:
        """Return what promises the most tokens after `token_ids`; others decide what of it is verified."""
        best: DraftProposal | None = None
        for record in self._records:
            if most_tokens < 1 or not self._may_propose(record, most_tokens):
                continue
            before = self.costs.clock()
            proposal = self._proposed(record, token_ids, most_tokens)
            drafting_s = self.costs.clock() - before
            path, acceptance = proposal.tree.first_path(), record.classes[proposal.confidence]
            expected = acceptance.by_position()
            offer = DraftProposal(record.draft.name, proposal.token_ids, expected, drafting_s)
            is_best = bool(path) and (best is None or offer.expected_tokens > best.expected_tokens)
            if is_best or (path and len(record.watched) < MOST_WATCHED):
                record.watched.append(_Watched(proposal.tree, path, acceptance))
            declined = best if is_best else offer
            best = offer if is_best else best
            self.wasted_s += declined.drafting_s if declined is not None else 0.0
        return best

    def reject_proposal(self, offer: DraftProposal) -> None:
        """Nothing of an offer is verified."""
        self.wasted_s += offer.drafting_s

    def shared(self, seconds: float) -> None:
        """This answer's part of a pass of several, whose costs another observes, took so long."""
        self._useful_s += seconds

    def _may_propose(self, record: _Record, most: int) -> bool:
        """Whether proposing pays, or there is time to waste on finding out."""
        if self.wasted_s <= FIRST_WASTE_S + WASTED_SHARE * self._useful_s:
            return True
        if record.draft.is_free:
            return False
        return self._best_gain(record, 0, most) > LEAST_GAIN

    def _proposed(self, record: _Record, token_ids: Sequence[int], most: int) -> Proposal:
        """A draft that fails, or proposes nonsense, proposes nothing."""
        try:
            record.draft.follow(token_ids)
            proposal = record.draft.propose(most)
            tree = proposal.tree
            known = 0 <= proposal.confidence < len(record.classes)
            if not known or max(tree.depths(), default=0) >= most:
                return Proposal()
        except Exception:  # whatever a draft does, the answer goes on without it
            return Proposal()
        if self._branches:
            return proposal
        return Proposal(tree.of_rows(tree.first_path()), proposal.confidence)

    def _best_gain(self, record: _Record, confidence: int, most: int) -> float:
        """Return what the best chain of this class promises before there is one."""
        chain = TokenTree.chain((0,) * most)
        return self._best_tree(record, record.classes[confidence], chain, most)[0]

    def _best_tree(
        self, record: _Record, acceptance: Acceptance, tree: TokenTree, most: int
    ) -> tuple[float, TokenTree]:
        """Return what the best number of a tree's likeliest rows promises, and those rows."""
        reached = chances(tree, acceptance)
        likeliest = sorted(range(len(tree)), key=lambda row: -reached[row])[:most]
        path = set(tree.first_path())
        plain_s, token_s = self.costs.of(1), 0.0 if record.draft.is_free else record.token_s
        tokens, drafting_s = 1.0, 0.0
        best, num_best = 0.0, 1
        for number, row in enumerate(likeliest, start=1):
            tokens += reached[row]
            drafting_s += token_s * (row in path)
            gain = tokens * plain_s / (self.costs.of(number + 1) + drafting_s)
            if gain > best:
                best, num_best = gain, number
        return best, tree.of_rows(sorted(likeliest[:num_best]))
