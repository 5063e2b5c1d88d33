"""Particles: weights of answers that are generated side by side, and which of them go on (sequential Monte Carlo).

Each particle is an answer; its weight is the product of its draws' weights. Where few particles have most of the
weight, all are drawn anew in proportion to their weights: an answer that can hardly go on legally gives its place to
another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def needs_resampling(log_weights: Sequence[float]) -> bool:
    """Whether the effective number of particles is less than half of them; not where all have failed."""
    weights = normalised(log_weights)
    return bool(weights) and 1 / sum(one * one for one in weights) < len(weights) / 2


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Return the weights with a sum of 1; none where all of them are 0."""
    largest = max(log_weights)
    if largest == -math.inf:
        return []
    weights = [math.exp(one - largest) for one in log_weights]
    total = sum(weights)
    return [one / total for one in weights]


def mean_log_weight(log_weights: Sequence[float]) -> float:
    """Return the logarithm of the mean weight, which every particle has after resampling."""
    largest = max(log_weights)
    mean = sum(math.exp(one - largest) for one in log_weights) / len(log_weights)
    return largest + math.log(mean)


def ancestors(log_weights: Sequence[float], chooser: random.Random) -> list[int]:
    """Return for each particle which one it goes on from; those that survive go on from themselves.

    Systematic resampling (Kitagawa, 1996): one draw places all, so that each particle gets its share rounded down or
    up. The order carries nothing, so it is chosen to move few.
    """
    number = len(log_weights)
    at, reached, counts = chooser.random(), 0.0, [0] * number
    for i, share in enumerate(normalised(log_weights)):
        reached += share * number
        while at < reached and sum(counts) < number:
            counts[i] += 1
            at += 1
    # The last shares may round to a sum below their number.
    counts[counts.index(max(counts))] += number - sum(counts)
    found = [i if counts[i] else -1 for i in range(number)]
    spare = [i for i in range(number) for _ in range(counts[i] - 1)]
    return [spare.pop() if one < 0 else one for one in found]
