"""Decoding reads merged keys with much attention weight exactly; reading prompts does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_text import sample_text

from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Reference
from lowtide.attention.policy import PassController
from lowtide.memory.plan.line import SCRATCH
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

TEXT = sample_text()
LENGTH, NUM_DECODED = 700, 12


@pytest.fixture(
    scope="module",
    params=[
        Delta(window=96, sparsity=0.6),
        Delta(window=96, granularity="block", sparsity=0.9),
        Delta(window=96, granularity="element", threshold=3),
    ],
    ids=lambda policy: policy.granularity,
)
def policy(request: pytest.FixtureRequest) -> Delta:
    found: Delta = request.param
    return found


@pytest.fixture(scope="module")
def engine(smollm2: Path, policy: Delta) -> Iterator[Engine]:
    config = LoadConfig(memory="2GiB", context=1024, threads=1, attention=policy)
    made = Engine(plan_reference(smollm2, config))
    yield made
    made.close()


def configured(engine: Engine, policy: Delta) -> PassController:
    assert engine.hook is not None
    spec = engine.model.spec
    return policy.resolve(spec).configure(engine.hook, spec)


def read(engine: Engine, policy: Delta) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits after a prompt, and those after some decoded tokens."""
    model, controller = engine.model, configured(engine, policy)
    token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    model.truncate(0)
    for begin in range(0, LENGTH, 100):
        controller.begin_prefill()
        prompt = np.array(model.forward(token_ids[begin : begin + 100]))
    for token_id in token_ids[LENGTH : LENGTH + NUM_DECODED]:
        controller.begin_decode()
        last = np.array(model.forward((token_id,)))
    return prompt, last


def test_only_decoding_refines_and_stays_inside_the_plan(engine: Engine, policy: Delta) -> None:
    prompt, last = read(engine, policy)
    merged_prompt, merged_last = read(engine, replace(policy, refine=0))
    assert np.array_equal(prompt, merged_prompt)
    assert not np.array_equal(last, merged_last)
    assert engine.hook is not None
    line = next(line for line in engine.planned.plan.rows if line.component == SCRATCH)
    assert engine.hook.counts().scratch_bytes <= line.num_bytes


def test_refining_more_is_nearer_to_dense_attention(engine: Engine, policy: Delta) -> None:
    assert engine.hook is not None
    token_ids = engine.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    reference = Reference(engine.model, DenseController(engine.hook), token_ids, LENGTH, 24)
    none, some, more = (
        reference.distance(configured(engine, replace(policy, refine=share))).kl
        for share in (0, 0.01, 0.001)
    )
    assert none > some > more
