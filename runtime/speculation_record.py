"""SpeculationRecord: what speculation did in one answer, counted. Decides nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

MOST_STRETCHES = 64
"""Stretches of rounds of equal size that are kept: the last ones."""


class SpeculationRecord:
    """Rounds, tokens and seconds."""

    def __init__(self) -> None:
        self.num_rounds = self._num_drafted = self._num_accepted = self._num_on_branches = 0
        self._drafting_s = self._verifying_s = 0.0
        self._by_draft = Counter[str]()
        self._stretches: list[list[int]] = []

    def drafting(self, seconds: float) -> None:
        """Drafts were asked, whether they had anything to say or not."""
        self._drafting_s += seconds

    def drafted(self, name: str, num_tokens: int) -> None:
        """A round begins with so many tokens of a draft."""
        self.num_rounds += 1
        self._num_drafted += num_tokens
        self._by_draft[name] += 1
        num_rows = num_tokens + 1
        if self._stretches and self._stretches[-1][0] == num_rows:
            self._stretches[-1][1] += 1
        else:
            self._stretches = [*self._stretches, [num_rows, 1]][-MOST_STRETCHES:]

    def verified(self, seconds: float) -> None:
        """Its pass took so long."""
        self._verifying_s += seconds

    def accepted(self, *, on_branch: bool) -> None:
        """A drafted token was right."""
        self._num_accepted += 1
        self._num_on_branches += on_branch

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON; `rows` has pairs of rows and rounds, in order, the last ones."""
        rounds = self.num_rounds
        return {
            "rounds": rounds,
            "drafted": self._num_drafted,
            "accepted": self._num_accepted,
            "accepted_on_branches": self._num_on_branches,
            "mean_accepted": self._num_accepted / rounds if rounds else None,
            "drafting_s": self._drafting_s,
            "verifying_s": self._verifying_s,
            "rows": [tuple(stretch) for stretch in self._stretches],
            "rounds_by_draft": dict(self._by_draft),
        }
