"""RetentionMap: where in a prompt the tokens lie that a filter kept, as a value to draw. Knows no policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BINS = 400


@dataclass(frozen=True, slots=True)
class RetainedSpan:
    """Neighbouring tokens that were kept: where they begin, how many, their highest score, as text."""

    position: int
    tokens: int
    score: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionMap:
    """A filtered prompt of `num_tokens` in bins of `bin_tokens` each, the last one shorter.

    `scores` has each bin's highest score, `kept` the share of its tokens that was kept.
    """

    num_tokens: int
    num_kept: int
    bin_tokens: int
    scores: tuple[float, ...]
    kept: tuple[float, ...]
    passages: tuple[RetainedSpan, ...]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float32],
        positions: NDArray[np.int64],
        passages: Sequence[RetainedSpan],
    ) -> RetentionMap:
        """Put a score for each token, and the positions of the kept ones, into bins."""
        import numpy as np

        bin_tokens = -(-len(scores) // MAX_BINS)
        starts = np.arange(0, len(scores), bin_tokens)
        sizes = np.diff(np.append(starts, len(scores)))
        kept = np.bincount(positions // bin_tokens, minlength=len(starts)) / sizes
        return cls(
            num_tokens=len(scores),
            num_kept=len(positions),
            bin_tokens=bin_tokens,
            scores=tuple(np.maximum.reduceat(scores, starts).tolist()),
            kept=tuple(kept.tolist()),
            passages=tuple(passages),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)
