"""GenerationResult: a whole answer as a value. Knows no runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowtide.runtime.generate import Piece
from lowtide.runtime.prompt_heat import Passage
from lowtide.runtime.statistics import Statistics


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer: its text, the tokens that were sampled, why it ended, what it cost; see `Piece`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Statistics
    kept: tuple[Passage, ...] = ()

    @classmethod
    def of(cls, pieces: Iterator[Piece]) -> GenerationResult:
        """Run `pieces` to the end and put them together."""
        collected = list(pieces)
        last = collected[-1]
        return cls(
            text="".join(piece.text for piece in collected),
            token_ids=tuple(p.token_id for p in collected if p.token_id is not None),
            finish_reason=last.finish_reason or "stop",
            stats=last.stats,
            kept=last.kept,
        )
