"""Quality of the delta policy by tokens, blocks and elements, on another kind of text than it was tuned on.

The per-head parameters come from Python's language reference for a sparsity, or from the calibration. The
policy is compared with dense attention over 200 tokens of essays, and on passkeys, half of which have two
equal neighbours. Run with `make bench`; a case takes minutes.
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
from lowtide.models.gguf.header.spec import read_spec

pytestmark = pytest.mark.benchmark

MAX_KL = 0.012
MAX_KL_OF_FEW_LAYERS = 0.03
MAX_NLL_CHANGE = 0.01


def compare_with_dense(
    benchmark: Any, path: Path, policy: Delta, sparsity: float | None, *trials: Trial
) -> list[tuple[Distance, ScoreCost]]:
    """Return distance and cost of each trial; a sparsity of None uses the calibration.

    The last trial must need the most memory.
    """
    with Essays.open(path, policy, trials[-1]) as essays:
        if sparsity is None:
            spread: Delta = policy.resolve(read_spec(path))
        else:
            spread = essays.of_sparsity(policy, sparsity)
        results: list[tuple[Distance, ScoreCost]] = benchmark.pedantic(
            lambda: [measured(replace(essays, trial=trial), spread) for trial in trials], rounds=1
        )
    return results


def measured(held: Essays, spread: Delta) -> tuple[Distance, ScoreCost]:
    """Measure and print the distance, the lost passkeys and the skipped multiplications."""
    distance, cost = held.distance(spread)
    dense, lost = held.keys_found(spread)
    print(
        f"\n{spread}, after {held.trial.prefix:,} tokens: KL {distance.kl:.4f}, NLL "
        f"{distance.nll_change:+.2%}, passkeys {dense - len(lost)} of {dense}; lost: "
        f"{'; '.join(lost) or 'none'}"
    )
    if spread.channels is not None:
        print(
            f"{cost}, {1 - cost.key_bytes_read / cost.key_bytes_total:.0%} of the bytes of keys not read"
        )
    return distance, cost


BY_GRANULARITY: list[tuple[Delta, float]] = [
    (Delta(), 0.5),
    (Delta(granularity="block"), 0.5),
    (Delta(granularity="block"), 0.7),
    (Delta(granularity="element"), 0.7),
    (Delta(granularity="element"), 0.9),
]
GRANULARITY_IDS = ["tokens", "block of 8", "block of 8, 70 %", "element", "element, 90 %"]


@pytest.mark.parametrize(
    ("policy", "sparsity"),
    [*BY_GRANULARITY, (Delta(refine=0.0), 0.6)],
    ids=[*GRANULARITY_IDS, "tokens, no refinement, 60 %"],
)
def test_distance_and_cost(benchmark: Any, smollm2: Path, policy: Delta, sparsity: float) -> None:
    ((distance, cost),) = compare_with_dense(benchmark, smollm2, policy, sparsity, SHORT)
    assert distance.kl <= MAX_KL
    assert abs(distance.nll_change) <= MAX_NLL_CHANGE
    if policy.channels is not None:  # the sparsity of groups is exact
        assert abs(cost.sparsity - sparsity) < 0.03


@pytest.mark.parametrize(("policy", "sparsity"), BY_GRANULARITY, ids=GRANULARITY_IDS)
def test_in_layers_without_a_window(benchmark: Any, policy: Delta, sparsity: float) -> None:
    """Gemma-3-270m: its other layers have a sliding window and stay dense, so the distance is larger."""
    results = compare_with_dense(benchmark, resolve("gemma3-270m"), policy, sparsity, LONG, LONGER)
    assert all(distance.kl <= MAX_KL_OF_FEW_LAYERS for distance, _ in results)


def test_the_calibration_in_layers_without_a_window(benchmark: Any) -> None:
    gemma, by_blocks = resolve("gemma3-270m"), Delta(granularity="block")
    results = compare_with_dense(benchmark, gemma, by_blocks, None, LONG, LONGER)
    assert all(distance.kl <= MAX_KL_OF_FEW_LAYERS for distance, _ in results)


def test_distance_of_another_order_of_sums(benchmark: Any, smollm2: Path) -> None:
    """llama.cpp's matmul compared with lowtide's, both exact: the noise that no policy can avoid."""

    def answers(*, repack: bool) -> list[tuple[bool, float]]:
        with Essays.open(smollm2, Delta(), SHORT, repack=repack) as held:
            passkeys = list(held.passkeys())
            return [
                (passkey.key in held.answer(None, passkey), held.lead(passkey))
                for passkey in passkeys
            ]

    def both() -> list[tuple[tuple[bool, float], tuple[bool, float]]]:
        return list(zip(answers(repack=True), answers(repack=False), strict=True))

    pairs = benchmark.pedantic(both, rounds=1)
    found = [by_llama for (is_found, _), (by_llama, _) in pairs if is_found]
    moved = np.array([by_llama - lead for (_, lead), (_, by_llama) in pairs])
    print(
        f"\npasskeys {sum(found)} of {len(found)}; the log-odds of a passkey move by {moved.std():.2f} nats "
        f"(standard deviation), at most by {np.abs(moved).max():.2f}"
    )
    assert sum(found) >= 0.9 * len(found)
