"""Offer: what is proposed for one answer, for whoever shares a pass out among several. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.memory.speculation_plan import expected_tokens


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft's proposal, which took `drafting_s` seconds; `acceptance` is what is believed by position."""

    draft: str
    token_ids: tuple[int, ...]
    acceptance: Sequence[float]
    drafting_s: float

    @property
    def promise(self) -> float:
        """How many tokens come of verifying all of it, on average, one that is no draft among them."""
        return expected_tokens(self.acceptance, len(self.token_ids))

    @property
    def believed(self) -> Sequence[float]:
        """What is believed of each proposed token, where those before it came."""
        return self.acceptance[: len(self.token_ids)]
