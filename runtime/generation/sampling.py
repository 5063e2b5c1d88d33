"""Sampler: chooses one token from logits. Its only state is its random generator.

The steps are in llama.cpp's default order: biases and penalties, top-k, top-p, min-p, temperature, draw. With a
constraint on the answer, all steps but the first see legal tokens only, as if the others were not in the vocabulary.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowtide.runtime.generation.logit_changes import changed_logits
from lowtide.runtime.generation.logprobs import LogprobMeter
from lowtide.runtime.options import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.answer import ConstrainedAnswer

    Indices = NDArray[np.int32]

WIDE_MARGIN = 12.0
"""Logits further than this below the largest are rarely among the top k; they are sorted only if needed."""
MANY_TIMES = 8
"""Of so many times the tokens that are needed, the most probable ones, enough are mostly legal."""
FEW_SHARE = 8
"""Partial sorting is used for up to 1/8 of the vocabulary; for more, everything is sorted."""


class Sampler:
    """Chooses tokens under `params`; `seed` is the seed in use, drawn at random where `params` has none."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self.seed = int.from_bytes(os.urandom(6), "little") if params.seed is None else params.seed
        self._random = random.Random(self.seed)

    def choose(
        self,
        logits: Logits,
        history: Sequence[int],
        answer: ConstrainedAnswer | None = None,
        *,
        num_prompt: int = 0,
    ) -> int:
        """Return the next token after `history`, given its `logits` of shape (vocabulary,).

        The first `num_prompt` tokens of `history` were not sampled. `answer` says which tokens are legal; None for
        all.
        """
        logits = changed_logits(logits, self._params, history, num_prompt)
        if answer is not None:
            return self._choose_legal(answer.weigh(logits), answer)
        if self._params.temperature == 0:
            return int(logits.argmax())
        return self._draw(logits)

    def _choose_legal(self, logits: Logits, answer: ConstrainedAnswer) -> int:
        """Return a legal token. A greedy choice is mostly legal as it is, which is cheaper to ask than the mask."""
        is_greedy = self._params.temperature == 0
        if is_greedy:
            best = int(logits.argmax())
            if answer.allows(best):
                return best
            legal_best = answer.best_legal(logits)
            if legal_best is not None:
                return legal_best
        num_needed = 1 if is_greedy else self._params.top_k
        if num_needed:
            likely = _largest(logits, MANY_TIMES * num_needed)
            likely = likely[answer.legal_among(likely)][:num_needed]
            if len(likely) == num_needed:
                return int(likely[0] if is_greedy else likely[self._draw(logits[likely])])
        legal = answer.legal_ids()
        legal = legal[legal < len(logits)]
        if is_greedy or len(legal) == 1:
            chosen = int(legal[logits[legal].argmax()])
            if not is_greedy:
                self._random.random()
            return chosen
        return int(legal[self._draw(logits[legal])])

    def _draw(self, logits: Logits) -> int:
        candidates, probabilities = self.distribution(logits)
        np.cumsum(probabilities, out=probabilities)
        return int(candidates[np.searchsorted(probabilities, self._random.random())])

    def distribution(self, logits: Logits) -> tuple[Indices, NDArray[np.float64]]:
        """Return the tokens that may be drawn, most probable first, and their probabilities (sum 1).

        Holds at most four fp32 arrays of the vocabulary's size at once, as the memory plan has it.
        """
        params = self._params
        candidates = _largest(logits, params.top_k)
        largest = logits[candidates]
        count = len(largest)
        if params.top_p < 1:
            count = _num_until(largest, params.top_p)
        if params.min_p > 0:
            min_logit = largest[0] + math.log(params.min_p)
            count = min(count, int(np.count_nonzero(largest >= min_logit)))
        tempered = _softmax(largest[:count], params.temperature)
        tempered[-1] += 1.0 - tempered.sum()  # the cumulative sum must reach 1
        return candidates[:count], tempered


def _largest(logits: Logits, count: int) -> Indices:
    """Return the indices of the `count` largest logits (0: of all), largest first."""
    if not 0 < count <= len(logits) // FEW_SHARE:
        order = np.argsort(-logits, kind="stable").astype(np.int32)
        return order[: count or None]
    near = np.flatnonzero(logits > logits.max() - WIDE_MARGIN)
    if len(near) < count:
        return _largest(logits, 0)[:count]
    values = logits[near]
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates: Indices = near[values >= least].astype(
        np.int32
    )  # more than `count` where several are equal to the least
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]


def _num_until(logits: Logits, share: float) -> int:
    """Return how many of the sorted logits reach a probability of `share` together."""
    reached = _softmax(logits)
    np.cumsum(reached, out=reached)
    return min(int(np.searchsorted(reached, share)) + 1, len(reached))


def _softmax(logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the probabilities of the logits at a temperature, in the same order, in fp64."""
    values = logits.astype(np.float64)
    values -= values.max()
    values /= temperature
    np.exp(values, out=values)
    values /= values.sum()
    return values


def preload() -> None:
    """Run every sampling step once on a small vocabulary.

    The first call of a numpy function reads its code from disk, which makes the process larger. The memory
    planner calls this before it measures the process (`runtime/backends/gguf_baseline.py`). A new sampling option
    must be switched on here.
    """
    options = SamplingParams(
        top_p=0.9, min_p=0.1, repeat_penalty=1.1, frequency_penalty=0.1, logit_bias={3: 1}
    )
    logits = np.linspace(0, 1, 1024, dtype=np.float32)
    Sampler(options).choose(logits, (1, 2))
    LogprobMeter(2, lambda _: b"").measure(logits, 1)
