"""Delta by blocks and by elements: what is lost with thresholds that were found on a text of another kind.

SmolLM2, with thresholds for a sparsity from 2,048 tokens of Python's language reference; held against dense
attention over 200 tokens after 1,600 of essays, and at pass keys. Run with `make bench`; takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from essays import essays

from lowtide.attention.delta.block_policy import DeltaBlocks
from lowtide.attention.delta.state_calibrate import StateCalibrator
from lowtide.attention.dense import DenseSteering
from lowtide.attention.needles import chat_framing, finds, hide_needle
from lowtide.attention.quality import Distance, Reference
from lowtide.attention.score_cost import ScoreCost
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_reference
from lowtide.runtime.sample_text import read_sample, sample_tokens

pytestmark = pytest.mark.benchmark

CONTEXT = 2048
PREFIX, SCORED = 1600, 200
OFFSETS = (0, 6000, 12000)
MOST_KL = 0.012
LENGTHS, DEPTHS, KEYS = (1000, 2000), (0.9, 0.5, 0.1), (0, 1)


@dataclass(frozen=True, slots=True)
class Essays:
    """A loaded model and a text that nothing was calibrated on."""

    loaded: LoadedModel
    token_ids: list[int]

    def distance(self, policy: DeltaBlocks) -> tuple[Distance, ScoreCost]:
        """From dense attention over all places, prompts read by the policy; and what scores cost."""
        model, hook = self.loaded.model, self.loaded.hook
        assert hook is not None
        total, before = Distance(), hook.counts()
        for offset in OFFSETS:
            text = [self.token_ids[0], *self.token_ids[1 + offset :][: PREFIX + SCORED]]
            model.truncate(0)
            place = Reference(model, DenseSteering(hook), text, PREFIX, SCORED)
            total += place.distance(policy.fitted(model.spec).install(hook, model.spec))
        return total, hook.counts().scores - before.scores

    def keys_found(self, policy: DeltaBlocks) -> tuple[int, int]:
        """How many pass keys dense attention finds, and how many of these the policy."""
        model, hook = self.loaded.model, self.loaded.hook
        assert hook is not None
        dense = ours = 0
        for length in LENGTHS:
            for depth in DEPTHS:
                for seed in KEYS:
                    framing = chat_framing(model)
                    haystack = self.token_ids[1 + 6000 * seed :]
                    needle = hide_needle(model, haystack, framing, length, depth, 90 + seed)
                    model.truncate(0)
                    if not finds(model, DenseSteering(hook), needle):
                        continue
                    dense += 1
                    steering = policy.fitted(model.spec).install(hook, model.spec)
                    model.truncate(0)
                    ours += finds(model, steering, needle)
        return dense, ours


@pytest.fixture(scope="module")
def held(smollm2: Path) -> Iterator[Essays]:
    attention = "delta:granularity=element,threshold=0"  # what takes the most memory
    options = OpenOptions(memory="4GiB", context=CONTEXT + 256, threads=2, attention=attention)
    loaded = LoadedModel(plan_reference(smollm2, options))
    token_ids = loaded.model.tokenizer.encode(essays(), add_special=True, parse_special=False)
    yield Essays(loaded, token_ids)
    loaded.close()


@pytest.mark.parametrize(
    ("policy", "sparsity"),
    [
        (DeltaBlocks(), 0.5),
        (DeltaBlocks(granularity="element"), 0.7),
    ],
    ids=["block of 8", "element"],
)
def test_what_is_lost_and_skipped(
    benchmark: Any, held: Essays, policy: DeltaBlocks, sparsity: float
) -> None:
    model, hook = held.loaded.model, held.loaded.hook
    assert hook is not None
    text = sample_tokens(
        model.tokenizer, read_sample(None, 2 * CONTEXT), 2 * CONTEXT + 2, whose="the reference"
    )
    framing = chat_framing(model)
    search = StateCalibrator(model, hook, text, CONTEXT, framing, policy)
    (units,) = search.spread([sparsity])
    calibrated = replace(policy, units=units, origin="spread over layers and heads")
    distance, cost = benchmark.pedantic(lambda: held.distance(calibrated), rounds=1)
    dense, ours = held.keys_found(calibrated)
    benchmark.extra_info.update(cost.to_dict(), kl=distance.kl, found=ours, of=dense)
    print(
        f"\n{calibrated}: KL {distance.kl:.4f}, NLL {distance.nll_change:+.2%}, {cost}, "
        f"{1 - cost.key_bytes_read / cost.key_bytes_held:.0%} of the bytes of keys not read, pass keys "
        f"{ours} of {dense}"
    )
    assert distance.kl <= MOST_KL and abs(cost.sparsity - sparsity) < 0.03
