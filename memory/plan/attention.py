"""KeyStates: what a plan must know of keys that are kept as states beside the cache.

Knows no policy.

OpenedKeys: what a plan must know of keys that decoding looks up behind what stands for them.

Knows no policy.

FilterPrefill: what a plan must know of prompts that only the first layers read whole. Knows no policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowtide.memory.plan.estimates import PAGE_KEYS, attention_bytes, padded_context
from lowtide.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStates:
    """Of `num_kv_head_params` layers and KV heads what stands for blocks of `block` channels, in pages of 64.

    `opened`: decoding looks at some keys themselves.
    """

    num_kv_head_params: int
    block: int
    opened: bool = False

    def num_bytes(self, num_cells: int, head_dim: int) -> int:
        """Return the most that states of so many cells take: every block sent, in half precision, of each
        block of a page which keys are alike, and where the page begins."""
        pages = num_cells // PAGE_KEYS
        sent = 2 * (pages * PAGE_KEYS * head_dim + 16)
        groups = (PAGE_KEYS + 1) * pages * (head_dim // self.block)
        return self.num_kv_head_params * (sent + groups + 16 * (pages + 1))


def state_bytes(spec: ModelSpec, states: KeyStates, context: int, threads: int) -> int:
    """Return the most that attention over states takes beside that of every key: the states, were every
    block sent, and a scratch alike."""
    held = states.num_bytes(padded_context(context), spec.key_head_dim)
    return held + attention_bytes(spec, context, threads)


MOST_ROWS = 4
"""Rows that leave their scores at once: `WatchedScores` in attention/native/watched_scores.h."""
MOST_WAITING = 256


def opened_bytes(spec: ModelSpec, num_keys: int, threads: int) -> int:
    """Return what the scores of `num_keys` keys of a few rows take, and the sums that are exchanged."""
    group = -(-spec.num_heads // max(min(filter(None, spec.num_kv_heads), default=1), 1))
    # Whole blocks of scores, and three numbers of each line's softmax.
    scores = MOST_ROWS * spec.num_heads * 4 * (num_keys + PAGE_KEYS + 3)
    sums = 2 * group * 4 * (2 + spec.value_head_dim)
    return scores + threads * (sums + 2 * 4 * MOST_WAITING)


ANSWER_TOKENS = 1024
"""Room in the cache for what follows a prompt of which tokens were kept."""


def retained_tokens(k: int | float, num_tokens: int) -> int:
    """Return how many tokens `k` is: a share of `num_tokens`, rounded up, where it is below 1."""
    return int(k) if k >= 1 else math.ceil(k * num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterPrefill:
    """`num_layers` read a prompt whole, and `k` of its tokens (a share of them, where below 1) go on.

    Prompts of up to `min_tokens` are not filtered.
    """

    num_layers: int
    k: int | float
    min_tokens: int

    def cache_tokens(self, num_tokens: int) -> int:
        """Return for how many tokens the cache of all layers needs room, with prompts of `num_tokens`."""
        kept = max(retained_tokens(self.k, num_tokens), self.min_tokens)
        return min(kept + ANSWER_TOKENS, num_tokens)
