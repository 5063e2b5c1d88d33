"""WeightedSampler: draws by rejection, and says how much of the model's probability was legal (AWRS).

Adaptive weighted rejection sampling (Lipkin et al., COLM 2025, arXiv 2504.05410): tokens are drawn without replacement
until one is legal, which is a draw from the legal ones without a mask of them. The weight of the draw is an unbiased
estimate of the legal tokens' probability; what particles do with it is in `particles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lowtide.runtime.generation.logit_changes import changed_logits
from lowtide.runtime.generation.sampling import Sampler
from lowtide.runtime.options import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.answer import ConstrainedAnswer

MAX_REJECTED = 16
"""So many illegal tokens are drawn; then the mask is computed, which gives the legal probability itself."""
NUM_ASKED = 4
"""Likely tokens that are asked for beside the one that was drawn; the paper asks for none, and its estimate varies."""
NOTHING = 1e-12
"""Less probability than this is none."""


class WeightedSampler(Sampler):
    """Chooses tokens from the whole distribution at a temperature; top-k, top-p and min-p are not asked."""

    def choose(
        self,
        logits: Logits,
        history: Sequence[int],
        answer: ConstrainedAnswer | None = None,
        *,
        num_prompt: int = 0,
    ) -> int:
        """Return the next token, and leave the logarithm of its weight in the answer."""
        logits = changed_logits(logits, self._params, history, num_prompt)
        if answer is None:
            return self._pick(_probabilities(logits, self._params.temperature))
        chances = _probabilities(answer.weigh(logits), self._params.temperature)
        for _ in range(MAX_REJECTED):
            token_id = self._pick(chances)
            chance = float(chances[token_id])
            chances[token_id] = 0.0
            if answer.allows(token_id):
                answer.set_log_weight(math.log(chance + self._legal_share(chances, answer)))
                return token_id
            answer.note_illegal(token_id)
            if float(chances.sum()) < NOTHING:
                break
        legal = answer.legal_ids()
        legal = legal[legal < len(logits)]
        of_legal = _scaled(logits[legal], logits, self._params.temperature)
        total = float(of_legal.sum())
        if total < NOTHING:
            of_legal = _probabilities(logits[legal], self._params.temperature)
        answer.set_log_weight(math.log(max(total, 1e-300)))
        return int(legal[self._pick(of_legal)])

    def _legal_share(self, chances: NDArray[np.float64], answer: ConstrainedAnswer) -> float:
        """Return an unbiased estimate of how much of `chances` is legal.

        The most probable tokens are asked for; one draw stands for all the others.
        """
        found = 0.0
        for _ in range(NUM_ASKED):
            likeliest = int(chances.argmax())
            chance, chances[likeliest] = float(chances[likeliest]), 0.0
            if chance and answer.allows(likeliest):
                found += chance
        rest = float(chances.sum())
        return found + rest if rest > NOTHING and answer.allows(self._pick(chances)) else found

    def _pick(self, chances: NDArray[np.float64]) -> int:
        """Return an index, drawn in proportion to `chances`."""
        reached = np.cumsum(chances)
        found = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return min(found, int(np.flatnonzero(chances)[-1]) if found >= len(chances) else found)


def sampler_of(params: SamplingParams) -> Sampler:
    """Return the sampler of `params.sampling`: what compares probabilities draws from the whole distribution."""
    if params.sampling == "masked":
        return Sampler(params)
    whole = replace(params, top_k=0, top_p=1.0, min_p=0.0)
    return Sampler(whole) if params.sampling == "asap" else WeightedSampler(whole)


def _scaled(values: Logits, logits: Logits, temperature: float) -> NDArray[np.float64]:
    """Return the probabilities that some of the logits have among all."""
    largest = float(logits.max())
    total = float(np.exp((logits.astype(np.float64) - largest) / temperature).sum())
    found: NDArray[np.float64] = np.exp((values.astype(np.float64) - largest) / temperature) / total
    return found


def _probabilities(logits: Logits, temperature: float) -> NDArray[np.float64]:
    return _scaled(logits, logits, temperature)
