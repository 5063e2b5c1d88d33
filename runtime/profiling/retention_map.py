"""RetentionMap: which tokens of a prompt a filter retained, by position, as a value to draw."""

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
    """Consecutive retained tokens: position of the first, how many, their highest score, and their text."""

    position: int
    tokens: int
    score: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionMap:
    """A filtered prompt of `num_tokens`, in bins of `bin_tokens` tokens; the last bin may be shorter.

    `scores` has the highest score of each bin, `retained` the share of its tokens that was retained.
    """

    num_tokens: int
    num_retained: int
    bin_tokens: int
    scores: tuple[float, ...]
    retained: tuple[float, ...]
    spans: tuple[RetainedSpan, ...]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float32],
        positions: NDArray[np.int64],
        spans: Sequence[RetainedSpan],
    ) -> RetentionMap:
        """Put the score of each token, and the positions of the retained tokens, into bins."""
        import numpy as np

        bin_tokens = -(-len(scores) // MAX_BINS)
        starts = np.arange(0, len(scores), bin_tokens)
        sizes = np.diff(np.append(starts, len(scores)))
        retained = np.bincount(positions // bin_tokens, minlength=len(starts)) / sizes
        return cls(
            num_tokens=len(scores),
            num_retained=len(positions),
            bin_tokens=bin_tokens,
            scores=tuple(np.maximum.reduceat(scores, starts).tolist()),
            retained=tuple(retained.tolist()),
            spans=tuple(spans),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)
