"""Delta's parameters: how they are resolved, and how a sparsity is spread over layers and heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lowtide.attention.delta.blocks import BlockMemory, HeadThresholds
from lowtide.attention.delta.groups import GroupMemory, HeadGroups, allocate, fit_score_bias
from lowtide.attention.delta.head_params import cheapest, scale_bytes
from lowtide.attention.delta.policy import Delta
from lowtide.models.spec import ModelSpec


def test_a_sparsity_groups_the_tokens_of_every_head_alike(smollm2_spec: ModelSpec) -> None:
    fitted = Delta(sparsity=0.5).resolve(smollm2_spec)
    assert fitted.params == HeadGroups.uniform(30, 3, 64, 32)
    assert str(fitted) == "delta, sparsity 50%, window 128 (user)"
    assert fitted.memory == GroupMemory(num_groups=(32,) * 90, window=128, refines=True)


def test_a_sparsity_or_threshold_merges_the_blocks_of_every_head_alike(
    smollm2_spec: ModelSpec,
) -> None:
    spec = replace(smollm2_spec, fingerprint="0" * 32)
    fitted = Delta(granularity="block", sparsity=0.5).resolve(spec)
    assert fitted.params == HeadThresholds.uniform(30, 3, 64, block=8, share=0.5)
    assert str(fitted) == "delta, blocks of 8, sparsity 50%, window 128 (user)"
    assert fitted.memory == BlockMemory(num_heads=90, block=8, refines=True)
    element = Delta(granularity="element", threshold=0.25, refine=0).resolve(spec)
    assert element.params == HeadThresholds.uniform(30, 3, 64, block=1, threshold=0.25)
    assert str(element) == "delta, elements, threshold 0.25, window 128 (user), refine 0.00%"
    assert element.memory == BlockMemory(num_heads=90, block=1, refines=False)


def test_a_threshold_is_relative_to_the_calibrated_queries(smollm2_spec: ModelSpec) -> None:
    params = Delta(granularity="element", threshold=0.25).resolve(smollm2_spec).params
    assert isinstance(params, HeadThresholds)
    assert params.query_rms != HeadThresholds.uniform(30, 3, 64, block=1).query_rms


def test_a_layer_that_stays_dense_needs_no_memory(smollm2_spec: ModelSpec) -> None:
    params = HeadThresholds.uniform(30, 3, 64, block=8)
    dense = (-1.0, -1.0, -1.0)
    params = replace(params, thresholds=(dense, *params.thresholds[1:]))
    memory = Delta(granularity="block", params=params).resolve(smollm2_spec).memory
    assert memory == BlockMemory(num_heads=87, block=8, refines=True)


def errors_of(loss: Callable[[float], float]) -> np.ndarray:
    """Errors of four heads with 8, 16 and 32 groups; the first loses a hundred times as much as the last."""
    heads = np.array([1, 0.1, 0.03, 0.01])
    return np.stack([heads * loss(n) for n in (8, 16, 32)]).reshape(3, 2, 2).astype(np.float32)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.9])
def test_heads_that_lose_more_get_more_groups(share: float) -> None:
    errors = errors_of(lambda n: (1 - n / 64) ** 2)
    found = np.array(allocate(errors, (8, 16, 32), share)).ravel()
    assert found.mean() <= share * 64
    assert list(found) == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_a_head_that_cannot_be_grouped_keeps_everything_and_does_not_count() -> None:
    errors = errors_of(lambda n: 1 - n / 64)
    errors[:, 0, 0] = np.inf
    found = np.array(allocate(errors, (8, 16, 32), 0.25)).ravel()
    assert found[0] == 64
    assert 8 <= found[1:].mean() <= 16


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [0.3, 0.5, 0.8])
def test_the_choices_of_a_few_heads_are_optimal(seed: int, most: float) -> None:
    rng = np.random.default_rng(seed)
    shares = np.sort(rng.random((4, 3)), axis=0) * 0.3 + 0.1
    errors = -np.sort(-rng.random((4, 3)), axis=0)
    found = cheapest(errors[:, None].astype(np.float32), shares[:, None], most)
    assert found is not None
    kept, costs = np.vstack([shares, np.ones(3)]), np.vstack([errors, np.zeros(3)])
    heads = range(3)
    by_choices = {
        picked: (kept[picked, heads].mean(), costs[picked, heads].sum())
        for picked in itertools.product(range(5), repeat=3)
    }
    share, cost = by_choices[tuple(map(int, found[0]))]
    assert share <= most
    step = 1 / 512  # shares are rounded up to that
    assert cost <= min(c for s, c in by_choices.values() if s <= most - step) + 1e-6


def test_a_share_below_the_smallest_choices_is_not_found() -> None:
    errors, shares = np.ones((1, 1, 2), np.float32), np.full((1, 1, 2), 0.4)
    assert cheapest(errors, shares, 0.39) is None
    assert cheapest(np.full_like(errors, np.inf), shares, 0.9) is None


def test_each_head_gets_its_best_score_bias() -> None:
    best = np.array([[0.0, 0.3], [1.0, 0.12]])
    squares = np.array([[2.0, 8.0], [1.0, 6.0]], np.float32)
    expected = best * squares / 2
    found = fit_score_bias(
        squares, lambda score_bias: np.abs(np.array(score_bias) - expected).astype(np.float32)
    )
    assert np.allclose(found, expected, rtol=1e-3)


def test_scales_are_the_queries_rms_relative_to_the_largest() -> None:
    squares = np.array([[[4.0, 1.0, 0.0, 0.25]]], np.float32)
    assert scale_bytes(squares) == ((bytes([255, 128, 1, 64]),),)
