"""How GemFilter selects the tokens of a prompt: scores of one layer's keys, pooled, and the k best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.structs import ScoreRule
from lowtide.memory.plan.attention import retained_tokens
from lowtide.models.errors import BadOption

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ROWS = 32
"""The tokens whose queries score lie in one pass, and every plan has passes of at least so many."""
CHOICES = {"weights": ("softmax", "raw"), "heads": ("max", "sum"), "pool": ("max", "mean")}
RULE_FIELDS = ("rows", "weights", "heads", "pool", "pool_size", "first", "last")
"""The settings that a calibrated layer depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemSelection:
    """The selection rule of one layer: `k` tokens (below 1: a share) of prompts above `min_prompt` tokens.

    The fields from `rows` to `last` are those of `Gem`. Raises `BadOption` for impossible values.
    """

    layer: int
    k: int | float
    min_prompt: int
    rows: int
    weights: str
    heads: str
    pool: str
    pool_size: int
    first: int
    last: int

    @property
    def rule(self) -> ScoreRule:
        """How queries and heads score a key."""
        return ScoreRule(self.rows, self.weights == "softmax", self.heads == "max")

    @property
    def rule_params(self) -> dict[str, Any]:
        """The rule by the names of its settings, as a calibration file has it."""
        return {name: getattr(self, name) for name in RULE_FIELDS}

    def applies_to(self, num_tokens: int) -> bool:
        """Whether a prompt of `num_tokens` tokens is filtered."""
        return num_tokens > max(self.min_prompt, self.budget(num_tokens))

    def budget(self, num_tokens: int) -> int:
        """Return how many tokens of a prompt are retained."""
        return max(retained_tokens(self.k, num_tokens), self.first + self.last)

    def retained(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the positions to retain, ascending, from the scores (tokens,); of equals the earlier."""
        import numpy as np

        ranked = self._ranked(scores)
        best = np.argsort(-ranked, kind="stable")[: self.budget(len(scores))]
        positions: NDArray[np.int64] = np.sort(best)
        return positions

    def needed_k(self, scores: NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> int:
        """Return the k that surely retains every token of `spans`, begin and end each.

        That is the number of tokens that score no less than the lowest of them; if the layer does not see
        the spans, that is the whole prompt.
        """
        ranked = self._ranked(scores)
        lowest = min(ranked[begin:end].min() for begin, end in spans)
        return int((ranked >= lowest).sum())

    def _ranked(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the pooled scores, infinite for tokens that are always retained."""
        import numpy as np

        ranked = pooled(scores, self.pool, self.pool_size)
        ranked[: self.first] = np.inf
        ranked[len(ranked) - min(self.last, len(ranked)) :] = np.inf
        return ranked


def pooled(scores: NDArray[np.float32], pool: str, size: int) -> NDArray[np.float32]:
    """Return every score pooled over its `size` neighbours (a mean takes zeros beyond the ends)."""
    import numpy as np

    half = size // 2
    if pool == "mean":
        return np.convolve(scores, np.full(size, 1 / size, np.float32), mode="full")[
            half : half + len(scores)
        ].astype(np.float32)
    padded = np.pad(scores, half, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)
    largest: NDArray[np.float32] = windows.max(axis=1)
    return largest


def check_k(k: int | float, forced: int) -> None:
    """Raise `BadOption` for a k that is no count or share, or that has no room for `forced` tokens."""
    if k <= 0 or (k >= 1 and k != int(k)):
        raise BadOption(
            f"gem's k is {k}; it must be a number of tokens, or a share of the prompt below 1"
        )
    if 1 <= k < forced:
        raise BadOption(
            f"gem's k is {k}; it must be at least {forced}, because the first and last tokens are always "
            "among the k"
        )
