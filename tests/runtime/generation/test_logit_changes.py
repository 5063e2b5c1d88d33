"""Biases, frequency and presence penalties against their formula, and answers with drafts against those without."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculating import controller_of, perfect, speculate_with

from lowtide import FakeModel, GenerationResult, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.generation.logit_changes import changed_logits
from lowtide.runtime.speculation.drafts import Draft

TOKENS = st.lists(st.integers(0, 9), max_size=30)
LOGITS = np.linspace(-2, 2, 10, dtype=np.float32)


@given(
    TOKENS,
    TOKENS,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=5),
)
def test_logits_change_by_the_published_formula(
    prompt: list[int], sampled: list[int], frequency: float, presence: float, bias: dict[int, float]
) -> None:
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
    before = LOGITS.copy()
    found = changed_logits(LOGITS, params, [*prompt, *sampled], len(prompt))
    counts = Counter(sampled)
    for token_id in range(10):
        times = counts[token_id]
        expected = LOGITS[token_id] + bias.get(token_id, 0)
        expected -= times * frequency + (times > 0) * presence
        assert found[token_id] == pytest.approx(expected, abs=1e-4)
    assert (before == LOGITS).all()


def test_a_bias_of_minus_100_bans_a_token() -> None:
    with Runtime.open(FakeModel(["Hello."]), memory="8GiB") as runtime:
        free = runtime.generate("Hi\n", temperature=0)
        banned = runtime.generate("Hi\n", temperature=0, logit_bias={ord("e"): -100}, max_tokens=5)
    assert free.text == "Hello."
    assert "e" not in banned.text


REPLY = "one two three one two three one two three one two three one two three"
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0, "frequency_penalty": 0.4},
    {"temperature": 1.5, "top_k": 0, "presence_penalty": 1.2, "frequency_penalty": 0.5, "seed": 5},
    {"temperature": 4, "top_k": 0, "logit_bias": {ord("o"): 3.0, ord("t"): -4}, "seed": 7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_drafts_change_nothing(options: dict[str, Any]) -> None:
    def answer(draft: Draft | None) -> GenerationResult:
        with Runtime.open(FakeModel([REPLY]), memory="8GiB") as runtime:
            speculate_with(runtime, controller_of(draft) if draft is not None else None)
            return runtime.generate("Say it.\n", max_tokens=60, logprobs=2, **options)

    plain, drafted = answer(None), answer(perfect(tuple(REPLY.encode())))
    assert drafted.stats.speculation is not None and drafted.stats.speculation["accepted"] > 0
    assert drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs


def test_a_batch_has_each_answers_own_penalties() -> None:
    each = [SamplingParams(temperature=0, logit_bias={ord("e"): b}) for b in (0, -100)]
    with Runtime.open(FakeModel(["Hello."]), memory="8GiB") as runtime:
        first, second = runtime.generate_batch(["Hi\n", "Hi\n"], each)
    assert first.text == "Hello."
    assert "e" not in second.text


BAD = {
    "frequency_penalty": [2.1, -3, "much"],
    "presence_penalty": [float("nan"), 5],
    "logit_bias": [{1: 101}, {-1: 1}, {"word": 1}, 5, {1: None}, [1, 2]],
    "logprobs": [-1, 21, 0.5, True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadOption, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_bias_of_a_token_that_the_model_lacks_is_refused() -> None:
    with (
        Runtime.open(FakeModel(), memory="8GiB") as runtime,
        pytest.raises(BadOption, match="logit_bias has token 999"),
    ):
        runtime.generate("Hi", logit_bias={999: 1})


def test_a_checked_bias_is_valid_again() -> None:
    params = SamplingParams(logit_bias={"7": "1.5", 3: -2})
    assert params.logit_bias == ((3, -2), (7, 1.5))
    assert SamplingParams.of(params, seed=1).logit_bias == params.logit_bias
