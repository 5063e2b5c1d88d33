"""The sampler against the softmax, its limits one by one, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.generation.sampling import Sampler


def logits_of(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def distribution(logits: np.ndarray, **options: object) -> dict[int, float]:
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, **options}
    sampler = Sampler(SamplingParams(**plain))  # type: ignore[arg-type]
    tokens, probabilities = sampler.distribution(logits)
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50).map(
    lambda v: logits_of(*v)
)


@given(LOGITS)
def test_without_limits_it_is_the_softmax(logits: np.ndarray) -> None:
    expected = softmax(logits)
    found = distribution(logits)
    assert len(found) == len(logits)
    np.testing.assert_allclose([found[i] for i in range(len(logits))], expected, atol=1e-12)


@given(LOGITS, st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 5))
def test_limits_leave_the_most_probable_tokens(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    found = distribution(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    left = np.array(list(found))
    assert 1 <= len(left) <= (top_k or len(logits))
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert min(found.values()) >= -1e-12
    dropped = np.setdiff1d(np.arange(len(logits)), left)
    if len(dropped):
        assert logits[left].min() >= logits[dropped].max()
    if min_p > 0:
        assert all(logits[left] >= logits.max() + np.log(min_p) - 1e-5)


def test_top_p_includes_the_token_that_reaches_it() -> None:
    logits = np.log(logits_of(0.5, 0.3, 0.15, 0.05))
    assert set(distribution(logits, top_p=0.5)) == {0}
    assert set(distribution(logits, top_p=0.51)) == {0, 1}
    assert set(distribution(logits, top_p=0.0)) == {0}


def test_top_k_among_many_far_away() -> None:
    logits = np.full(50000, -100, dtype=np.float32)
    logits[[7, 70, 700]] = [5, 4, 3]
    assert list(distribution(logits, top_k=2)) == [7, 70]
    assert len(distribution(logits, top_k=10)) == 10


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_top_k_is_the_start_of_a_stable_order(spread: float) -> None:
    random = np.random.default_rng(0)
    for top_k in (1, 8, 40, 320):
        logits = np.round(random.normal(0, spread, 5000), 1).astype(np.float32)  # many are equal
        expected = np.argsort(-logits, kind="stable")[:top_k]
        assert list(distribution(logits, top_k=top_k)) == expected.tolist()


def test_draws_follow_the_distribution() -> None:
    logits = np.log(logits_of(0.6, 0.3, 0.1))
    sampler = Sampler(SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=11))
    draws = np.bincount([sampler.choose(logits, ()) for _ in range(20000)], minlength=3) / 20000
    np.testing.assert_allclose(draws, [0.6, 0.3, 0.1], atol=0.015)


def test_temperature_sharpens() -> None:
    logits = logits_of(1.0, 0.0)
    assert distribution(logits, temperature=0.5)[0] == pytest.approx(1 / (1 + np.exp(-2)))


def test_greedy_is_the_largest_logit_and_the_first_of_equals() -> None:
    greedy = Sampler(SamplingParams(temperature=0))
    assert greedy.choose(logits_of(1, 3, 2), ()) == 1
    assert greedy.choose(logits_of(3, 1, 3), ()) == 0


def test_a_seed_repeats_and_a_random_one_is_reported() -> None:
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    first = Sampler(SamplingParams())
    again = Sampler(SamplingParams(seed=first.seed))
    assert [first.choose(logits, ()) for _ in range(20)] == [
        again.choose(logits, ()) for _ in range(20)
    ]
    assert Sampler(SamplingParams()).seed != first.seed


def test_repeated_tokens_are_penalised_within_repeat_last_n() -> None:
    params = SamplingParams(temperature=0, repeat_penalty=2.0, repeat_last_n=2)
    logits = logits_of(3.0, 2.0, -1.0)
    assert Sampler(params).choose(logits, [0, 2, 2]) == 0  # token 0 is out of reach
    assert Sampler(params).choose(logits, [2, 0]) == 1
    assert logits.tolist() == [3.0, 2.0, -1.0]  # the model's array is unchanged
    negative = logits_of(-1.0, -1.5)
    assert Sampler(params).choose(negative, [0]) == 1


BAD = {
    "temperature": [-0.1, "hot", float("nan"), True],
    "top_p": [1.1, -1],
    "top_k": [-1, 1.5],
    "max_tokens": [0, -5],
    "seed": [-2, 1 << 63],
    "repeat_penalty": [0],
    "stop": [("",), (1,)],
    "overflow": ["truncate"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadOption, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        BadOption, match=r"unknown sampling parameter 'temprature'; the parameters are max_tokens"
    ):
        SamplingParams.of(temprature=1)


def test_parameters_print_as_the_call_that_makes_them() -> None:
    params = SamplingParams(temperature=0, stop="END")
    assert eval(repr(params), {"SamplingParams": SamplingParams}) == params
