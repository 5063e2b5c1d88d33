"""Delta by rows, blocks and elements: what is lost with units that were found on a text of another kind.

With units for a sparsity from Python's language reference; held against dense attention over 200 tokens
after 1,600 of essays, and at pass keys, of which every other has two neighbours
equal. Run with `make bench`; takes minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from held_essays import Essays, Policy

from lowtide.attention.delta.block_policy import DeltaBlocks
from lowtide.attention.delta.policy import Delta

pytestmark = pytest.mark.benchmark

MOST_KL = 0.012


@pytest.mark.parametrize(
    ("policy", "sparsity"),
    [(Delta(), 0.5), (DeltaBlocks(), 0.5), (DeltaBlocks(granularity="element"), 0.7)],
    ids=["rows", "block of 8", "element"],
)
def test_what_is_lost_and_skipped(
    benchmark: Any, smollm2: Path, policy: Policy, sparsity: float
) -> None:
    with Essays.opened(smollm2, policy) as held:
        spread = held.of_sparsity(policy, sparsity)
        distance, cost = benchmark.pedantic(lambda: held.distance(spread), rounds=1)
        dense, lost = held.keys_found(spread)
    benchmark.extra_info.update(kl=distance.kl, found=dense - len(lost), of=dense)
    print(
        f"\n{spread}: KL {distance.kl:.4f}, NLL {distance.nll_change:+.2%}, pass keys "
        f"{dense - len(lost)} of {dense}; lost: {'; '.join(lost) or 'none'}"
    )
    assert distance.kl <= MOST_KL
    if isinstance(policy, DeltaBlocks):  # of groups the units say it
        print(
            f"{cost}, {1 - cost.key_bytes_read / cost.key_bytes_held:.0%} of the bytes of keys not read"
        )
        assert abs(cost.sparsity - sparsity) < 0.03
