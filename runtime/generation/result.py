"""What a generation returns: one chunk for each token, or the whole result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.profiling.retention_map import RetainedSpan


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """The text that one sampled token adds to an answer."""

    text: str
    """New text. Empty while a character is incomplete or the text could be the start of a stop text."""
    token_id: int | None
    """The sampled token; None for the model's own end-of-text token."""
    finish_reason: str | None
    """Set on the last chunk only: "stop", "length", "context" (the context is full) or "memory" (the budget
    has no room for another token; the tokens so far are kept)."""
    stats: Statistics
    """Counts and times up to this token; complete on the last chunk."""
    retained: tuple[RetainedSpan, ...] = ()
    """With `explain=True`, on the last chunk: the spans of the prompt that GemFilter retained."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished answer."""

    text: str
    """The whole text, without the stop text that ended it."""
    token_ids: tuple[int, ...]
    """The sampled tokens, without the end-of-text token."""
    finish_reason: str
    """Why it ended; the same values as in `GenerationChunk`."""
    stats: Statistics
    """What the whole answer cost."""
    retained: tuple[RetainedSpan, ...] = ()
    """With `explain=True`: the spans of the prompt that GemFilter retained."""

    @property
    def structured(self) -> dict[str, Any] | None:
        """With a constraint: how it was enforced, and whether the answer is complete and was closed."""
        return self.stats.structured

    @classmethod
    def of(cls, chunks: Iterable[GenerationChunk]) -> GenerationResult:
        """Run `chunks` to the end and return them as one result."""
        collected = list(chunks)
        last = collected[-1]
        return cls(
            text="".join(chunk.text for chunk in collected),
            token_ids=tuple(c.token_id for c in collected if c.token_id is not None),
            finish_reason=last.finish_reason or "stop",
            stats=last.stats,
            retained=last.retained,
        )
