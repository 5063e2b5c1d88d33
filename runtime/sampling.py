"""Sampler: from logits to one token. Pure but for its own random generator; knows no model.

The order of the steps is llama.cpp's default: penalty, top-k, top-p, min-p, temperature, draw.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowtide.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lowtide.models.model import Logits

    Indices = NDArray[np.intp]

WIDE_MARGIN = 12.0
"""Logits this far below the largest are rarely among the first k: they are looked at only if need be."""


class Sampler:
    """Chooses tokens under `options`; `seed` is the one in use, drawn where none was given."""

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self.seed = secrets.randbits(48) if options.seed is None else options.seed
        self._random = np.random.default_rng(self.seed)

    def choose(self, logits: Logits, history: Sequence[int]) -> int:
        """Return the next token after `history`, given its `logits` of shape (vocabulary,)."""
        logits = self._penalised(logits, history)
        if self._options.temperature == 0:
            return int(logits.argmax())
        candidates, probabilities = self.distribution(logits)
        return int(candidates[np.searchsorted(probabilities.cumsum(), self._random.random())])

    def distribution(self, logits: Logits) -> tuple[Indices, NDArray[np.float64]]:
        """Return the tokens that can be drawn, most likely first, and their probabilities (sum 1)."""
        options = self._options
        candidates = _largest(logits, options.top_k)
        kept = logits[candidates].astype(np.float64)
        probabilities = _softmax(kept)
        if options.top_p < 1:
            before = probabilities.cumsum() - probabilities
            probabilities = (
                probabilities[before < options.top_p] if options.top_p > 0 else probabilities[:1]
            )
        count = len(probabilities)
        if options.min_p > 0:
            count = min(count, int(np.count_nonzero(kept >= kept[0] + math.log(options.min_p))))
        tempered = _softmax(kept[:count] / options.temperature)
        tempered[-1] += 1.0 - tempered.sum()  # the cumulative sum must reach 1
        return candidates[:count], tempered

    def _penalised(self, logits: Logits, history: Sequence[int]) -> Logits:
        penalty, last_n = self._options.repeat_penalty, self._options.repeat_last_n
        if penalty == 1 or last_n == 0 or not history:
            return logits
        recent = np.unique(np.asarray(history[-last_n:]))
        changed = logits.copy()
        values = changed[recent]
        changed[recent] = np.where(values > 0, values / penalty, values * penalty)
        return changed


def _largest(logits: Logits, count: int) -> Indices:
    """Return the indices of the `count` largest logits (0: all), largest first."""
    candidates: Indices | None = None
    if 0 < count < len(logits):
        near = np.flatnonzero(logits > logits.max() - WIDE_MARGIN)
        pool = near if len(near) >= count else np.arange(len(logits))
        values = logits[pool]
        candidates = pool[np.argpartition(values, len(values) - count)[-count:]]
    else:
        candidates = np.arange(len(logits))
    order: Indices = candidates[np.argsort(-logits[candidates], kind="stable")]
    return order


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials: NDArray[np.float64] = np.exp(values - values.max())
    result: NDArray[np.float64] = exponentials / exponentials.sum()
    return result
