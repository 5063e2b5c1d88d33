"""FirstPass: what a plan must know of prompts that only the first layers read whole. Knows no policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

ANSWER_TOKENS = 1024
"""Room in the cache for what follows a prompt of which tokens were kept."""


def kept_tokens(k: int | float, num_tokens: int) -> int:
    """Return how many tokens `k` is: a share of `num_tokens`, rounded up, where it is below 1."""
    return int(k) if k >= 1 else math.ceil(k * num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """`num_layers` read a prompt whole, and `k` of its tokens (a share of them, where below 1) go on.

    Prompts of up to `least_tokens` are not filtered.
    """

    num_layers: int
    k: int | float
    least_tokens: int

    def cache_tokens(self, num_tokens: int) -> int:
        """Return for how many tokens the cache of all layers needs room, with prompts of `num_tokens`."""
        kept = max(kept_tokens(self.k, num_tokens), self.least_tokens)
        return min(kept + ANSWER_TOKENS, num_tokens)
