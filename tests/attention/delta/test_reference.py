"""The oracles of delta: merged blocks and groups, checked against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    PAGE_KEYS,
    attention,
    delta_attention,
    grouped_attention,
    page_groups,
    page_points,
    reference_blocks,
)

SIZE = 32
BLOCKS = pytest.mark.parametrize("block", [1, 8, 16, SIZE], ids="element 8 16 token".split())


def keys_of(seed: int, num_keys: int) -> np.ndarray:
    """Return keys that drift, so that neighbours are similar."""
    steps = np.random.default_rng(seed).standard_normal((num_keys, SIZE))
    return np.cumsum(steps * 0.3, axis=0)


@BLOCKS
@given(seed=st.integers(0, 2**32 - 1), least=st.floats(0.01, 3))
@settings(deadline=None, max_examples=20)
def test_merged_keys_are_similar(block: int, seed: int, least: float) -> None:
    """Merged keys are within the threshold of a stored one, and so is their mean."""
    k, thresholds = keys_of(seed, 80), np.linspace(least, 2 * least, SIZE)
    merged, stored = reference_blocks(k, thresholds, num_first=4, block=block)
    off = ((k - merged) / thresholds).reshape(80, -1, block)
    assert np.sqrt((off**2).mean(axis=2)).max() <= 2 + 1e-12
    blocks = (k / thresholds).reshape(80, -1, block)
    apart = np.sqrt(((blocks[:, None] - blocks[None]) ** 2).mean(axis=3))
    same_page = np.arange(80) // PAGE_KEYS == np.arange(80)[:, None] // PAGE_KEYS
    candidates = stored[None] & same_page[:, :, None]
    assert np.where(candidates, apart, np.inf).min(axis=1).max() <= 1 + 1e-12
    assert stored[:4].all()
    assert (merged[:4] == k[:4]).all()
    for page in (slice(0, PAGE_KEYS), slice(PAGE_KEYS, 80)):
        by_block = merged[page].reshape(-1, SIZE // block, block)
        for values, is_stored in zip(by_block.swapaxes(0, 1), stored[page].T, strict=True):
            assert len(np.unique(values, axis=0)) == is_stored.sum()
        assert np.allclose(merged[page].mean(axis=0), k[page].mean(axis=0))


@BLOCKS
@given(seed=st.integers(0, 2**32 - 1), num_equal=st.integers(1, 199))
@settings(deadline=None, max_examples=20)
def test_a_page_depends_on_its_own_keys_only(block: int, seed: int, num_equal: int) -> None:
    k, other = keys_of(seed, 200), keys_of(seed + 1, 200)
    thresholds = np.full(SIZE, 0.8)
    whole, _ = reference_blocks(k, thresholds, num_first=4, block=block)
    mixed, _ = reference_blocks(
        np.concatenate([k[:num_equal], other[num_equal:]]), thresholds, num_first=4, block=block
    )
    num_keys = num_equal // PAGE_KEYS * PAGE_KEYS
    assert (whole[:num_keys] == mixed[:num_keys]).all()


def test_smaller_blocks_skip_more_at_one_threshold() -> None:
    k = keys_of(0, 200)
    skipped = [
        1 - reference_blocks(k, np.full(SIZE, 1.0), num_first=4, block=block)[1].mean()
        for block in (1, 8, SIZE)
    ]
    assert skipped[0] > 0.3
    assert sorted(skipped, reverse=True) == skipped


@BLOCKS
def test_a_threshold_of_zero_is_dense(block: int) -> None:
    q, k, v = random_inputs(3, rows=3, keys=90)
    merged, stored = reference_blocks(k, np.zeros(SIZE), num_first=4, block=block)
    assert stored.all()
    found = delta_attention(q, k[:, None], v[:, None], merged[:, None], scale=0.2, window=16)
    assert np.allclose(found, dense(q, k, v), rtol=1e-12, atol=1e-12)


def test_a_window_over_everything_is_dense() -> None:
    q, k, v = random_inputs(4, rows=3, keys=150)
    merged, _ = reference_blocks(k, np.full(SIZE, 9.0), num_first=4, block=1)
    one_head = {"scale": 0.2, "window": 150}
    found = delta_attention(q, k[:, None], v[:, None], merged[:, None], **one_head)
    assert np.allclose(found, dense(q, k, v), rtol=1e-12, atol=1e-12)
    grouped = grouped_attention(q, k, v, np.ones(SIZE), num_groups=8, **one_head)
    assert np.allclose(grouped, dense(q, k, v), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(8, PAGE_KEYS), fixed=st.integers(0, 4))
@settings(deadline=None, max_examples=20)
def test_groups_are_a_partition(seed: int, count: int, fixed: int) -> None:
    groups = page_groups(keys_of(seed, PAGE_KEYS), count, fixed)
    assert len(groups) == count
    assert sorted(key for rows in groups for key in rows) == list(range(PAGE_KEYS))
    assert groups[:fixed] == [[key] for key in range(fixed)]
    assert [rows[0] for rows in groups] == sorted(rows[0] for rows in groups)


def test_equal_keys_are_grouped_first_and_lose_nothing() -> None:
    q, k, v = random_inputs(5, rows=2, keys=3 * PAGE_KEYS)
    k[1::2] = k[::2]
    groups = page_groups(k[:PAGE_KEYS], PAGE_KEYS // 2)
    assert groups == [[key, key + 1] for key in range(0, PAGE_KEYS, 2)]
    found = grouped_attention(
        q, k, v, np.ones(SIZE), scale=0.2, window=20, num_groups=PAGE_KEYS // 2
    )
    assert np.allclose(found, dense(q, k, v), rtol=1e-12, atol=1e-12)


def test_equally_distant_keys_are_grouped_by_their_values() -> None:
    k = np.eye(PAGE_KEYS)
    v = np.repeat(np.random.default_rng(8).standard_normal((32, SIZE)), 2, axis=0)
    groups = page_groups(page_points(k, v, np.ones(PAGE_KEYS)), 32)
    assert groups == [[key, key + 1] for key in range(0, PAGE_KEYS, 2)]


def test_the_score_bias_gives_groups_the_weight_of_their_keys() -> None:
    rng, scale, num_grouped = np.random.default_rng(9), 0.25, 20 * PAGE_KEYS
    q = rng.standard_normal((200, 2, SIZE)).astype(np.float32)
    k = rng.standard_normal((num_grouped + 8, SIZE))
    v = np.zeros((len(k), 1))
    v[:num_grouped] = 1  # the result is the weight of grouped keys
    expected = attention(
        q, k[:, None], v[:, None], np.zeros((len(q), len(k)), np.float16), scale=scale
    )
    off = []
    for score_bias in (0.0, 0.5):
        found = [
            grouped_attention(
                q[i : i + 1],
                k,
                v,
                np.ones(SIZE),
                scale=scale,
                window=8,
                num_groups=16,
                score_bias=score_bias,
            )
            for i in range(0, 200, 20)
        ]
        ratio = (np.concatenate(found) / (1 - np.concatenate(found))) / (
            expected[::20] / (1 - expected[::20])
        )
        off.append(abs(np.log(ratio).mean()))
    assert off[1] < 0.2 * off[0]


def test_scales_weight_the_channels() -> None:
    rng = np.random.default_rng(6)
    k = rng.standard_normal((PAGE_KEYS, SIZE)) * 100
    k[:, 0] = np.repeat(np.arange(16), 4)
    scales = np.zeros(SIZE)
    scales[0] = 1
    groups = page_groups(page_points(k, np.ones((PAGE_KEYS, 1)), scales), 16)
    assert groups == [list(range(key, key + 4)) for key in range(0, PAGE_KEYS, 4)]


def random_inputs(seed: int, rows: int, keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return queries of two heads, and the keys and values of one KV head."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, 2, SIZE)).astype(np.float32)
    return q, rng.standard_normal((keys, SIZE)), rng.standard_normal((keys, SIZE))


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return causal attention of the last tokens."""
    seen = len(k) - len(q) + 1 + np.arange(len(q))
    mask = np.where(np.arange(len(k)) < seen[:, None], 0, -np.inf).astype(np.float16)
    return attention(q, k[:, None], v[:, None], mask, scale=0.2)
