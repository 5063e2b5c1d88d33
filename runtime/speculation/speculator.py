"""Speculator: the decoding half of THE loop where drafts are verified. Beside the plain step, not instead.

`decode` answers what a plain step would, the logits after a token, from a row that was verified already
where there is one. So everything that cuts an answer cuts it between two tokens, as without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowtide.memory.plan.speculation import CostCurve
from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.speculation.acceptance import DraftVerification, SpeculationRecord
from lowtide.runtime.speculation.control import SpeculationControl
from lowtide.runtime.speculation.drafts import Draft
from lowtide.runtime.speculation.step_cost import StepCostModel

if TYPE_CHECKING:
    from lowtide.models.model import Logits


class Speculator:
    """Drafts, verifies and accepts for one session; `most_rows` is what the plan has room for.

    `not_identical` says why answers may differ from the plain loop's; None where they cannot. `downgrades_from`
    says why nothing is verified from the start.
    """

    def __init__(
        self,
        drafts: Sequence[Draft],
        control: SpeculationControl,
        *,
        most_rows: int,
        vocabulary_size: int,
        not_identical: str | None = None,
        downgrades_from: str | None = None,
    ) -> None:
        self._drafts = tuple(drafts)
        self._control = control
        self._most_rows = most_rows
        self._vocabulary_size = vocabulary_size
        self._not_identical = not_identical
        self._given_up = downgrades_from
        self._verification: DraftVerification | None = None
        self._verifying_s = 0.0
        self._record = SpeculationRecord()

    @classmethod
    def without(cls, reason: str) -> Speculator:
        """Return one that never drafts, and says why."""
        no_costs = StepCostModel(CostCurve(num_rows=(1,), seconds=(1.0,)))
        return cls(
            (),
            SpeculationControl((), no_costs),
            most_rows=1,
            vocabulary_size=0,
            downgrades_from=reason,
        )

    def begin(self) -> None:
        """A new answer begins; what the last verification gave is not known where it was cut off."""
        self._verification = None
        self._record = SpeculationRecord()
        self._control.begin()

    def decode(self, session: KVSession, token_id: int) -> Logits:
        """Return the logits after `token_id`, which was chosen from those returned before."""
        self._control.observe_token(token_id)
        if self._verification is not None:
            logits = self._verification.accept(token_id)
            if logits is not None:
                session.accept(token_id, self._verification.row)
                self._record.accepted(on_branch=self._verification.is_branch)
                return logits
            self._control.end_round(self._verification.num_accepted + 1, self._verifying_s)
            self._verification = None
        drafted = self._drafted(session, token_id)
        if drafted is None:
            return self._plain(session, token_id)
        return self._verified(session, drafted.behind(token_id).trunk_first())

    def _drafted(self, session: KVSession, token_id: int) -> TokenTree | None:
        if self._given_up is not None:
            return None
        clock = self._control.costs.clock
        before = clock()
        most_rows = min(self._most_rows, session.num_free)
        chosen = self._control.chosen([*session.token_ids, token_id], most_rows)
        self._record.drafting(clock() - before)
        if chosen is None:
            return None
        name, tree = chosen
        if not all(0 <= drafted < self._vocabulary_size for drafted in tree.token_ids):
            return None
        self._record.drafted(name, len(tree))
        return tree

    def _plain(self, session: KVSession, token_id: int) -> Logits:
        clock = self._control.costs.clock
        before = clock()
        logits = session.decode((token_id,))
        self._control.passed(1, clock() - before)
        return logits

    def _verified(self, session: KVSession, tree: TokenTree) -> Logits:
        clock = self._control.costs.clock
        before = clock()
        rows = session.verify(tree)
        seconds = clock() - before
        self._control.passed(len(tree), seconds)
        self._record.verified(seconds)
        self._verifying_s = seconds
        self._verification = DraftVerification(tree, rows)
        return self._verification.first

    def statistics(self) -> dict[str, Any]:
        """Return the documented values of `stats.speculation`."""
        return {
            **self._record.to_dict(),
            "drafts": [draft.name for draft in self._drafts],
            "off_reason": self._off_reason(),
            "identical": self._not_identical is None,
            "nondeterminism": self._not_identical,
        }

    def _off_reason(self) -> str | None:
        if self._given_up is not None:
            return self._given_up
        if self._record.num_rounds:
            return None
        expected_tokens = self._control.best_promise
        if expected_tokens is None:
            return "no draft had anything to propose"
        return f"no proposal promised to pay: the best, {expected_tokens:.2f} x a plain step"

    def close(self) -> None:
        """Close the drafts; closing twice is allowed."""
        for draft in self._drafts:
            draft.close()
