"""Delta by rows, blocks and elements: what is lost with units that were found on a text of another kind.

SmolLM2, with units for a sparsity from 2,048 tokens of Python's language reference; held against dense
attention over 200 tokens after 1,600 of essays, and at pass keys, of which every other has two neighbours
equal. Run with `make bench`; takes minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from essays import essays

from lowtide.attention.delta.block_policy import DeltaBlocks
from lowtide.attention.delta.calibrate import DeltaCalibrator
from lowtide.attention.delta.policy import Delta
from lowtide.attention.delta.state_calibrate import StateCalibrator
from lowtide.attention.dense import DenseSteering
from lowtide.attention.needles import chat_framing, continued, finds, hide_needle, pass_key
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
LENGTHS, DEPTHS, NUM_KEYS = (1000, 2000), (0.9, 0.5, 0.1), 6

Policy = Delta | DeltaBlocks


@dataclass(frozen=True, slots=True)
class Essays:
    """A loaded model and a text that nothing was calibrated on."""

    loaded: LoadedModel
    token_ids: list[int]

    def distance(self, policy: Policy) -> tuple[Distance, ScoreCost]:
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

    def keys_found(self, policy: Policy) -> tuple[int, list[str]]:
        """How many pass keys dense attention finds, and what the policy says instead of which of these."""
        model, hook = self.loaded.model, self.loaded.hook
        assert hook is not None
        framing, dense, lost = chat_framing(model), 0, []
        for length, depth, seed in itertools.product(LENGTHS, DEPTHS, range(NUM_KEYS)):
            haystack = self.token_ids[1 + 3000 * seed :]
            key = pass_key(90 + seed, doubled=seed % 2 == 1)
            needle = hide_needle(model, haystack, framing, length, depth, key)
            model.truncate(0)
            if not finds(model, DenseSteering(hook), needle):
                continue
            dense += 1
            model.truncate(0)
            steering = policy.fitted(model.spec).install(hook, model.spec)
            answer = continued(model, steering, needle.token_ids)
            if key not in answer:
                lost.append(f"{key} at {depth:.0%} of {length:,}: {answer!r}")
        return dense, lost


@pytest.fixture
def held(smollm2: Path, attention: str) -> Iterator[Essays]:
    options = OpenOptions(
        memory="4GiB", context=CONTEXT + 256, threads=2, attention=attention, pack=True
    )
    loaded = LoadedModel(plan_reference(smollm2, options))
    token_ids = loaded.model.tokenizer.encode(essays(), add_special=True, parse_special=False)
    yield Essays(loaded, token_ids)
    loaded.close()


def of_sparsity(held: Essays, policy: Policy, sparsity: float) -> Policy:
    """Spread the sparsity over layers and heads, on the reference."""
    model, hook = held.loaded.model, held.loaded.hook
    assert hook is not None
    text = sample_tokens(
        model.tokenizer, read_sample(None, 2 * CONTEXT), 2 * CONTEXT + 2, whose="the reference"
    )
    place = (model, hook, text, CONTEXT, chat_framing(model))
    origin = "spread over layers and heads"
    if isinstance(policy, Delta):
        (groups,) = DeltaCalibrator(*place, policy).spread([sparsity])
        return replace(policy, units=groups, origin=origin)
    (units,) = StateCalibrator(*place, policy).spread([sparsity])
    return replace(policy, units=units, origin=origin)


@pytest.mark.parametrize(
    ("attention", "policy", "sparsity"),
    [
        ("delta", Delta(), 0.5),
        ("delta:granularity=block,threshold=0", DeltaBlocks(), 0.5),
        ("delta:granularity=element,threshold=0", DeltaBlocks(granularity="element"), 0.7),
    ],
    ids=["rows", "block of 8", "element"],
)
def test_what_is_lost_and_skipped(
    benchmark: Any, held: Essays, policy: Policy, sparsity: float
) -> None:
    spread = of_sparsity(held, policy, sparsity)
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
