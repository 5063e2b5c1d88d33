"""Delta by tokens, blocks and elements: what it loses with parameters from a text of another kind.

The parameters are for a sparsity on Python's language reference, or as calibrated. Compared with dense
attention over 200 tokens after a beginning of essays, and at passkeys. Run with `make bench`; takes minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_essays import LONG, LONGER, SHORT, Essays, Trial

from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.delta.policy import Delta
from lowtide.attention.evaluation.divergence import Distance
from lowtide.models.catalog import resolve
from lowtide.models.gguf.spec import read_spec

pytestmark = pytest.mark.benchmark

MOST_KL = 0.012
MOST_KL_OF_FEW_LAYERS = 0.03
MOST_NLL_CHANGE = 0.01


def held_against_dense(
    benchmark: Any, path: Path, policy: Delta, sparsity: float | None, *trials: Trial
) -> list[tuple[Distance, ScoreCost]]:
    """Return what is lost in each trial, without a sparsity as calibrated; the last one wants the most
    room."""
    with Essays.opened(path, policy, trials[-1]) as opened:
        if sparsity is None:
            spread: Delta = policy.resolve(read_spec(path))
        else:
            spread = opened.of_sparsity(policy, sparsity)
        results: list[tuple[Distance, ScoreCost]] = benchmark.pedantic(
            lambda: [measured(replace(opened, trial=trial), spread) for trial in trials], rounds=1
        )
    return results


def measured(held: Essays, spread: Delta) -> tuple[Distance, ScoreCost]:
    """Print what is lost and skipped."""
    distance, cost = held.distance(spread)
    dense, lost = held.keys_found(spread)
    print(
        f"\n{spread}, after {held.trial.prefix:,} tokens: KL {distance.kl:.4f}, NLL "
        f"{distance.nll_change:+.2%}, pass keys {dense - len(lost)} of {dense}; lost: "
        f"{'; '.join(lost) or 'none'}"
    )
    if spread.channels is not None:
        print(
            f"{cost}, {1 - cost.key_bytes_read / cost.key_bytes_held:.0%} of the bytes of keys not read"
        )
    return distance, cost


BY_GRANULARITY: list[tuple[Delta, float]] = [
    (Delta(), 0.5),
    (Delta(granularity="block"), 0.5),
    (Delta(granularity="block"), 0.7),
    (Delta(granularity="element"), 0.7),
    (Delta(granularity="element"), 0.9),
]
GRANULARITY_IDS = ["rows", "block of 8", "block of 8, 70 %", "element", "element, 90 %"]


@pytest.mark.parametrize(
    ("policy", "sparsity"),
    [*BY_GRANULARITY, (Delta(refine=0.0), 0.6)],
    ids=[*GRANULARITY_IDS, "rows as stored, 60 %"],
)
def test_what_is_lost_and_skipped(
    benchmark: Any, smollm2: Path, policy: Delta, sparsity: float
) -> None:
    ((distance, cost),) = held_against_dense(benchmark, smollm2, policy, sparsity, SHORT)
    assert distance.kl <= MOST_KL
    assert abs(distance.nll_change) <= MOST_NLL_CHANGE
    if policy.channels is not None:  # of groups the units say it
        assert abs(cost.sparsity - sparsity) < 0.03


@pytest.mark.parametrize(("policy", "sparsity"), BY_GRANULARITY, ids=GRANULARITY_IDS)
def test_in_layers_without_a_window(benchmark: Any, policy: Delta, sparsity: float) -> None:
    """Of Gemma-3-270m, whose other layers have a sliding window and stay dense: more is lost there."""
    results = held_against_dense(benchmark, resolve("gemma3-270m"), policy, sparsity, LONG, LONGER)
    assert all(distance.kl <= MOST_KL_OF_FEW_LAYERS for distance, _ in results)


def test_as_calibrated_in_layers_without_a_window(benchmark: Any) -> None:
    gemma, by_blocks = resolve("gemma3-270m"), Delta(granularity="block")
    results = held_against_dense(benchmark, gemma, by_blocks, None, LONG, LONGER)
    assert all(distance.kl <= MOST_KL_OF_FEW_LAYERS for distance, _ in results)


def test_what_another_order_of_sums_loses(benchmark: Any, smollm2: Path) -> None:
    """llama.cpp's products beside ours, both exact and with dense attention: what no policy is held to."""

    def answered(*, repack: bool) -> list[tuple[bool, float]]:
        with Essays.opened(smollm2, Delta(), SHORT, repack=repack) as held:
            passkeys = list(held.passkeys())
            return [
                (passkey.key in held.answer(None, passkey), held.lead(passkey))
                for passkey in passkeys
            ]

    def both() -> list[tuple[tuple[bool, float], tuple[bool, float]]]:
        return list(zip(answered(repack=True), answered(repack=False), strict=True))

    pairs = benchmark.pedantic(both, rounds=1)
    found = [theirs for (is_found, _), (theirs, _) in pairs if is_found]
    moved = np.array([theirs - ours for (_, ours), (_, theirs) in pairs])
    print(
        f"\npass keys {sum(found)} of {len(found)}; by how much dense attention prefers a key moves by "
        f"{moved.std():.2f} nats (standard deviation), {np.abs(moved).max():.2f} at the most"
    )
    assert sum(found) >= 0.9 * len(found)
