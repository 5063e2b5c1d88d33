"""SequenceDrafts: the drafts of one sequence, what each proposes, and how often it was right.

Every proposal is compared with the tokens that are sampled next, verified or not: so it is known at no cost how often
a draft is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.acceptance import Acceptance, SpeculationRecord, chances
from lowtide.runtime.speculation.constrained import legal_part
from lowtide.runtime.speculation.counts import AcceptanceCounts, Proposed
from lowtide.runtime.speculation.drafts import NOTHING, Draft, Proposal
from lowtide.runtime.speculation.proposal import MIN_GAIN, DraftProposal, gain_alone
from lowtide.runtime.speculation.step_cost import StepCostModel
from lowtide.runtime.structured.answer import ConstrainedAnswer

WASTED_SHARE = 0.005
"""Share of the decoding time that proposals which are not verified may take."""
FREE_WASTE_S = 0.0005
"""Seconds that such proposals may take before anything is decoded."""
MAX_WATCHED = 3
"""Proposals of a draft that are compared with the text at once, beside those that are verified."""


class _WatchedProposal:
    """Compares the first path of a proposal with the tokens that are sampled."""

    def __init__(self, proposal: DraftProposal, counts: AcceptanceCounts) -> None:
        self._tree = proposal.tree
        self._path = proposal.tree.first_path()
        self._acceptance = proposal.acceptance
        self._counts = counts
        self._key = proposal.draft, proposal.confidence
        self._num_right = 0

    def observe_token(self, token_id: int) -> bool:
        """Compare the next token; return whether more are to be compared."""
        row = self._path[self._num_right]
        if self._tree.token_ids[row] != token_id:
            self._count(1)
            self._count_siblings(row, token_id)
            return False
        self._num_right += 1
        if self._num_right == len(self._path):
            self._count(0)
            return False
        return True

    def _count(self, num_wrong: int) -> None:
        self._acceptance.count(self._num_right, num_wrong)
        self._counts.count(*self._key, self._num_right, num_wrong)

    def _count_siblings(self, row: int, token_id: int) -> None:
        for sibling in self._tree.later_siblings(row):
            is_right = self._tree.token_ids[sibling] == token_id
            self._acceptance.count_sibling(is_right=is_right)
            self._counts.count_sibling(*self._key, is_right=is_right)
            if is_right:
                return


@dataclass(slots=True)
class _DraftState:
    """A draft, its acceptance rates by class of confidence, and the seconds that a token of it takes."""

    draft: Draft
    classes: list[Acceptance]
    watched: list[_WatchedProposal] = field(default_factory=list)
    token_s: float = 0.0

    def proposal(
        self, tree: TokenTree, confidence: int, max_rows: int, drafting_s: float
    ) -> DraftProposal:
        """Return the tree's most probable rows as a proposal."""
        acceptance = self.classes[confidence]
        reached = chances(tree, acceptance)
        rows = sorted(range(len(tree)), key=lambda row: -reached[row])[:max_rows]
        token_s, path = 0.0 if self.draft.is_free else self.token_s, set(tree.first_path())
        return DraftProposal(
            draft=self.draft.name,
            confidence=confidence,
            tree=tree,
            acceptance=acceptance,
            rows=tuple(rows),
            chances=tuple(reached[row] for row in rows),
            seconds=tuple(token_s * (row in path) for row in rows),
            drafting_s=drafting_s,
        )


class SequenceDrafts:
    """The drafts of one sequence, what is known of them, and what they did in its answer.

    `best_gain` is the highest speed that any proposal promised, in multiples of a pass without drafts.
    """

    def __init__(
        self,
        drafts: Sequence[Draft],
        num_positions: int,
        vocabulary_size: int,
        counts: AcceptanceCounts,
        known: AcceptanceCounts,
        *,
        trees: bool,
    ) -> None:
        self._counts = counts
        self._proposed: Proposed | None = None
        self.record = SpeculationRecord()
        self.best_gain: float | None = None
        self._vocabulary_size = vocabulary_size
        self._num_positions = num_positions
        self.trees = trees
        self._answer: ConstrainedAnswer | None = None
        self._states = [
            _DraftState(
                draft,
                [
                    Acceptance(num_positions, draft.prior(c), known.rates_of(draft.name, c))
                    for c in range(draft.num_classes)
                ],
            )
            for draft in drafts
        ]
        self._wasted_s = self._decoded_s = 0.0

    def begin(self, answer: ConstrainedAnswer | None) -> None:
        """Start a new answer, which may be constrained; what was learned of the drafts stays."""
        self.record = SpeculationRecord()
        self.best_gain = None
        self._proposed = None
        self._answer = answer
        for state in self._states:
            state.watched.clear()

    @property
    def has_drafts(self) -> bool:
        """Whether anything may propose tokens."""
        return bool(self._states)

    def propose(
        self,
        text: Sequence[int],
        max_tokens: int,
        costs: StepCostModel,
        value: Callable[[DraftProposal], float],
        min_value: float,
    ) -> DraftProposal | None:
        """Return the proposal of the highest `value` above `min_value`, of at most `max_tokens` rows."""
        if max_tokens < 1:
            return None
        started = costs.clock()
        best, best_value = None, min_value
        proposed = list[tuple[str, int]]()
        for state in self._states:
            if not self._may_propose(state, max_tokens, costs):
                continue
            before = costs.clock()
            proposal = self._ask(state, text, max_tokens, costs.clock)
            its_value = min_value if proposal is None else value(proposal)
            if proposal is not None:
                proposed.append((proposal.draft, proposal.confidence))
            is_best = its_value > best_value
            if proposal is not None and (is_best or len(state.watched) < MAX_WATCHED):
                state.watched.append(_WatchedProposal(proposal, self._counts))
            if is_best:
                best, best_value = proposal, its_value
            else:
                self._wasted_s += costs.clock() - before
        self.record.add_drafting(costs.clock() - started)
        # A draft that was not asked, for want of time, proposes nothing: the plan promises what is really drafted.
        self._proposed = tuple(sorted(proposed))
        return best

    def _may_propose(self, state: _DraftState, max_tokens: int, costs: StepCostModel) -> bool:
        """Return whether a proposal is worth its time, or there is time to waste on finding out."""
        if self._wasted_s <= FREE_WASTE_S + WASTED_SHARE * self._decoded_s:
            return True
        if state.draft.is_free:
            return False
        longest = TokenTree.chain((0,) * max_tokens)
        return gain_alone(state.proposal(longest, 0, max_tokens, 0.0), costs) > MIN_GAIN

    def _ask(
        self,
        state: _DraftState,
        text: Sequence[int],
        max_tokens: int,
        clock: Callable[[], float],
    ) -> DraftProposal | None:
        """Return a draft's proposal; None where it has none, fails, or proposes something invalid."""
        before = clock()
        proposal = self._valid(state, text, max_tokens)
        drafting_s = clock() - before
        num_tokens = len(proposal.token_ids)
        if not num_tokens:
            return None
        state.token_s += 0.1 * (drafting_s / num_tokens - state.token_s)
        return state.proposal(proposal.tree, proposal.confidence, max_tokens, drafting_s)

    def _valid(self, state: _DraftState, text: Sequence[int], max_tokens: int) -> Proposal:
        try:
            state.draft.follow(text)
            proposal = state.draft.propose(max_tokens)
            tree = proposal.tree
            is_valid = (
                0 <= proposal.confidence < len(state.classes)
                and max(tree.depths(), default=0) < max_tokens
                and all(0 <= token_id < self._vocabulary_size for token_id in tree.token_ids)
            )
        except Exception:  # whatever a draft does, the answer goes on without it
            return Proposal()
        if not is_valid:
            return Proposal()
        if not self.trees:
            tree = tree.of_rows(tree.first_path())
        if self._answer is not None:
            tree = legal_part(tree, self._answer)
        return Proposal(tree, proposal.confidence)

    def take(self, proposal: DraftProposal | None, num_rows: int) -> TokenTree:
        """Return the first rows of a proposal, to be verified; its time is wasted where there are none."""
        if proposal is None:
            return NOTHING
        if not num_rows:
            self._wasted_s += proposal.drafting_s
            return NOTHING
        self.record.add_round(proposal.draft, num_rows)
        return proposal.first(num_rows)

    def note_gain(self, gain: float) -> None:
        """Remember the highest gain that was promised."""
        self.best_gain = max(gain, self.best_gain or 0.0)

    def add_step(self, seconds: float) -> None:
        """Add this sequence's share of a pass; the drafts may waste a share of it."""
        self._decoded_s += seconds

    def observe_token(self, token_id: int) -> None:
        """Compare a sampled token with the proposals that waited for it."""
        if self._proposed is not None:
            self._counts.count_tokens(self._proposed, 1)
        for state in self._states:
            if state.watched:
                state.watched = [one for one in state.watched if one.observe_token(token_id)]
