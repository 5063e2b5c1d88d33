"""OpenedKeys: what a plan must know of keys that decoding looks up behind what stands for them.

Knows no policy.
"""

from __future__ import annotations

from lowtide.memory.key_groups import PAGE_KEYS
from lowtide.models.spec import ModelSpec

MOST_ROWS = 4
"""Rows that leave their scores at once: `WatchedScores` in attention/native/watched_scores.h."""
MOST_WAITING = 256


def opened_bytes(spec: ModelSpec, num_keys: int, threads: int) -> int:
    """Return what the scores of `num_keys` keys of a few rows take, and the sums that are exchanged."""
    group = -(-spec.num_heads // max(min(filter(None, spec.num_kv_heads), default=1), 1))
    # Whole blocks of scores, and three numbers of each line's softmax.
    scores = MOST_ROWS * spec.num_heads * 4 * (num_keys + PAGE_KEYS + 3)
    sums = 2 * group * 4 * (2 + spec.value_head_size)
    return scores + threads * (sums + 2 * 4 * MOST_WAITING)
