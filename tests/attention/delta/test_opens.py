"""Decoding looks behind groups and states that get much of a head's weight; reading prompts does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Reference
from lowtide.attention.parse import parse_policy
from lowtide.attention.policy import PassController
from lowtide.memory.plan.line import SCRATCH
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.once

TEXT = (Path(__file__).resolve().parents[1] / "test_kernels.py").read_text()
LENGTH, NUM_DECODED = 700, 12


@pytest.fixture(
    params=["sparsity=0.6", "granularity=block,sparsity=0.9", "granularity=element,threshold=3"]
)
def opened(smollm2: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, str]]:
    attention = f"delta:window=96,{request.param}"
    options = LoadConfig(memory="2GiB", context=1024, threads=2, attention=attention)
    made = Engine(plan_reference(smollm2, options))
    yield made, attention
    made.close()


def installed(made: Engine, attention: str) -> PassController:
    assert made.hook is not None
    spec = made.model.spec
    return parse_policy(attention).resolve(spec).install(made.hook, spec)


def read(made: Engine, attention: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits after a prompt, and after some tokens more that are decoded."""
    model, controller = made.model, installed(made, attention)
    token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    model.truncate(0)
    for begin in range(0, LENGTH, 100):
        controller.begin_prefill()
        prompt = np.array(model.forward(token_ids[begin : begin + 100]))
    for token_id in token_ids[LENGTH : LENGTH + NUM_DECODED]:
        controller.begin_decode()
        last = np.array(model.forward((token_id,)))
    return prompt, last


def test_decoding_alone_opens_inside_the_plan(
    opened: tuple[Engine, str],
) -> None:
    made, attention = opened
    prompt, last = read(made, attention)
    closed_prompt, closed_last = read(made, f"{attention},refine=0")
    assert np.array_equal(prompt, closed_prompt)
    assert not np.array_equal(last, closed_last)
    assert made.hook is not None
    row = next(row for row in made.planned.plan.rows if row.component == SCRATCH)
    assert made.hook.counts().scratch_bytes <= row.num_bytes


def test_what_is_opened_brings_it_nearer_to_dense_attention(
    opened: tuple[Engine, str],
) -> None:
    made, attention = opened
    assert made.hook is not None
    token_ids = made.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    place = Reference(made.model, DenseController(made.hook), token_ids, LENGTH, 60)
    none, some, more = (
        place.distance(installed(made, f"{attention},refine={share}")).kl
        for share in ("0", "1%", "0.1%")
    )
    assert none > some > more
