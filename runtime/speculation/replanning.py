"""Replanner: weighs the plan's choices again between turns, with the acceptance of the conversation itself.

The drafts stay, because only a draft that runs can be counted. How many tokens a pass verifies, and whether drafts
branch, changes within what was planned and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowtide.memory.plan.speculation.allocator import (
    CostCurve,
    SpeculationChoice,
    SpeculationPoint,
    SpeculationWorth,
)
from lowtide.memory.plan.speculation.replanning import replanned
from lowtide.runtime.speculation.counts import AcceptanceCounts

RECENT_TOKENS = 400
"""Tokens that acceptance is known of: beyond them, older ones count less and less."""
MIN_NEW_TOKENS = 32
"""Tokens of a conversation after which the choices are weighed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPlan:
    """What the next turn verifies: at most `verify_batch` tokens in a pass; 1 where drafts are watched only.

    `promised` is the speed that is expected now, relative to none drafted; None where nothing is verified.
    """

    verify_batch: int
    branches: bool
    promised: float | None
    reason: str | None


class Replanner:
    """Decides between turns; `resize` takes or gives back the memory of a choice and says whether there was room.

    `points` are the plan's choices with their bytes, `planned` the one that was loaded, and `known` says how often
    drafts were right before. Drafting a token takes `token_share` of the time of a pass of one token.
    `may_watch` says whether drafts may be watched only, as a draft model that the user named may not.
    """

    def __init__(
        self,
        points: Sequence[SpeculationPoint],
        planned: SpeculationPoint,
        known: AcceptanceCounts,
        *,
        token_share: float,
        may_watch: bool,
        resize: Callable[[int], bool],
    ) -> None:
        self._points = [point for point in points if _is_within(point.choice, planned.choice)]
        self._current: SpeculationPoint | None = planned
        self._recent, self._seen = AcceptanceCounts(), AcceptanceCounts()
        self._drafts = planned.choice.drafts
        self._token_share = token_share
        self._may_watch = may_watch
        self._resize = resize
        self._remember(known)

    def between_turns(self, counts: AcceptanceCounts, costs: CostCurve) -> TurnPlan | None:
        """Return what the next turn verifies; None where too few tokens are new, or there is no room.

        `counts` are all of this run, and `costs` what passes take now.
        """
        new = AcceptanceCounts()
        new.add(counts)
        new.add(self._seen, -1.0)
        if new.num_tokens < MIN_NEW_TOKENS:
            return None
        self._seen.add(new)
        self._remember(new)
        worth = SpeculationWorth(
            costs=costs,
            situations=self._recent.situations(self._drafts, self._token_share * costs.of(1)),
            costs_source="measured in this run",
            acceptance_source="this conversation",
        )
        points = [replace(point, speed_up=worth.speed_up(point.choice)) for point in self._points]
        chosen = replanned(points, self._current)
        if chosen is None and not self._may_watch:
            chosen = min(points, key=lambda point: (point.num_bytes, -point.speed_up))
        verify_batch = chosen.choice.verify_batch if chosen is not None else 1
        if not self._resize(verify_batch):
            return None
        self._current = chosen
        best = max(point.speed_up for point in points)
        return TurnPlan(
            verify_batch=verify_batch,
            branches=chosen is not None and chosen.choice.branches,
            promised=chosen.speed_up if chosen is not None else None,
            reason=None
            if chosen is not None
            else f"in this conversation the best choice promises {best:.2f} x: drafts are watched",
        )

    def _remember(self, counts: AcceptanceCounts) -> None:
        self._recent.add(counts)
        if self._recent.num_tokens > RECENT_TOKENS:
            self._recent = self._recent.scaled_to(RECENT_TOKENS)


def _is_within(choice: SpeculationChoice, planned: SpeculationChoice) -> bool:
    return (
        choice.drafts == planned.drafts
        and choice.verify_batch <= planned.verify_batch
        and choice.branches <= planned.branches
    )
