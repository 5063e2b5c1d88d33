"""MemberSpeculation: what is drafted for one answer of a batch, and what became of it.

Has drafts and a control of its own, as acceptance is the answer's own. Knows no other member and no costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowtide.runtime.drafts.draft import Draft
from lowtide.runtime.offer import Offer
from lowtide.runtime.speculation_control import SpeculationControl
from lowtide.runtime.speculation_record import SpeculationRecord


class MemberSpeculation:
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
        self._offer: Offer | None = None
        self._best_promise: float | None = None
        self._record = SpeculationRecord()

    def offered(self, text: Sequence[int], num_free: int) -> Sequence[float]:
        """Return what is believed of each token proposed after `text`, which has room for `num_free`."""
        clock = self._control.costs.clock
        before = clock()
        offer = self._control.offered(text, min(num_free, self._most_drafted))
        self._record.drafting(clock() - before)
        if offer is not None and not all(0 <= t < self._vocabulary_size for t in offer.token_ids):
            self._control.declined(offer)
            offer = None
        self._offer = offer
        return offer.believed if offer is not None else ()

    def taken(self, num_drafted: int, promise: float | None) -> tuple[int, ...]:
        """Return so many tokens of the offer to verify; `promise` is what the best pass would gain."""
        if self._offer is None:
            return ()
        self._best_promise = max(promise or 0.0, self._best_promise or 0.0)
        if not num_drafted:
            self._control.declined(self._offer)
            return ()
        drafted = self._offer.token_ids[:num_drafted]
        self._record.drafted(self._offer.draft, len(drafted))
        return drafted

    def passed(self, seconds: float, *, num_members: int, has_drafts: bool) -> None:
        """A pass of so many members took so long; what drafting may waste is a share of this one's part."""
        self._control.shared(seconds / num_members)
        if has_drafts:
            self._record.verified(seconds)

    def came(self, token_id: int, *, is_accepted: bool) -> None:
        """A token was chosen, and the answer goes on; `is_accepted` where it was drafted."""
        self._control.came(token_id)
        if is_accepted:
            self._record.accepted(on_branch=False)

    def statistics(self, not_identical: str | None) -> dict[str, Any]:
        """Return the documented values of `stats.speculation`, `not_identical` as its reason."""
        return {
            **self._record.to_dict(),
            "drafts": [draft.name for draft in self._drafts],
            "off_reason": self._off_reason(),
            "identical": not_identical is None,
            "why_not_identical": not_identical,
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
