"""Passkeys that dense attention finds, and how many of them TidalDecode finds with its calibration.

SmolLM2 with 7,600 tokens of essays, from two places, with two passkeys at each of four depths. Prints counts
and no times. Run with `make bench`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from essays import essays

from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.passkeys import chat_framing, finds, hide_passkey, make_passkey
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.text.tokenizer import common_prefix
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark
LENGTH = 7600
DEPTHS = (0.9, 0.7, 0.5, 0.2)  # the common prefix of two prompts is read once
POLICIES = {"calibrated": Tidal(), "k=2048": Tidal(k=2048)}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_passkeys(benchmark: Any, smollm2: Path, share: float) -> None:
    options = LoadConfig(memory="4GiB", context=LENGTH + 80, threads=2, attention="tidal")
    loaded = Engine(plan_reference(smollm2, options))
    model, hook, spec = loaded.model, loaded.hook, loaded.planned.spec
    assert hook is not None
    text = model.tokenizer.encode(essays(), add_special=False, parse_special=False)
    haystack = text[int((len(text) - LENGTH) * share) :]
    framing = chat_framing(model)
    found = dict.fromkeys(["dense", *POLICIES], 0)
    cached: list[int] = []

    def count() -> None:
        for depth in DEPTHS:
            for seed in range(2):
                key = seed + round(depth * 100)
                passkey = hide_passkey(model, haystack, framing, LENGTH, depth, make_passkey(key))
                common = common_prefix(cached, passkey.token_ids)
                model.truncate(common)
                cached[:] = passkey.token_ids
                if not finds(model, DenseController(hook), passkey):
                    continue
                found["dense"] += 1
                for name, policy in POLICIES.items():
                    found[name] += finds(model, policy.resolve(spec).configure(hook, spec), passkey)

    benchmark.pedantic(count, rounds=1)
    benchmark.extra_info.update(found)
    print(f"\nessays from {share:.0%} on, of {2 * len(DEPTHS)} passkeys: {found}")
    loaded.close()
