"""Aligned sampling against the exact distribution of a toy model, and particles of whole runtimes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from toy_model import (
    END,
    EvenFirst,
    exact_distribution,
    log_chances,
    logits_after,
    perfect_variation,
    total_variation,
)

from lowtide import JsonSchema, Length, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.generation.sampling import Sampler
from lowtide.runtime.generation.weighted import sampler_of
from lowtide.runtime.structured.aligned.aligned import MAX_NODES, Aligned, Tries
from lowtide.runtime.structured.aligned.particles import (
    ancestors,
    mean_log_weight,
    needs_resampling,
    normalised,
)
from lowtide.runtime.structured.answer import ConstrainedAnswer, NoLegalToken

EXACT = exact_distribution()
SEEDS = (1, 2, 3)
"""The variation of one run alone was 0.101 to 0.111 with five seeds."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def params(sampling: str, seed: int = 1) -> SamplingParams:
    return SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed, sampling=sampling)


def answer(constraint: EvenFirst | Aligned, sampler: Sampler) -> tuple[int, ...] | None:
    """Return one answer of the toy model; None where it came to a dead end."""
    state = ConstrainedAnswer(constraint, (END,), None)
    state.begin(())
    text: list[int] = []
    try:
        while True:
            token_id = sampler.choose(logits_after(text), text, state)
            state.take(token_id)
            if token_id == END:
                return tuple(text)
            text.append(token_id)
    except NoLegalToken:
        return None


def asap_counts(num_answers: int, seed: int) -> tuple[Counter[tuple[int, ...]], Tries]:
    tries, sampler = Tries(), sampler_of(params("asap", seed))
    counts: Counter[tuple[int, ...]] = Counter()
    for i in range(2 * num_answers):
        if sum(counts.values()) == num_answers // 2:
            break
        text = answer(Aligned(EvenFirst(), tries, "toy", (END,), 1.0), sampler)
        if text is not None and i >= num_answers // 2:
            counts[text] += 1
    return counts, tries


def test_asap_comes_closer_to_the_exact_distribution_than_masking() -> None:
    sampler = sampler_of(params("masked"))
    masked = Counter(
        text for _ in range(10_000) if (text := answer(EvenFirst(), sampler)) is not None
    )
    runs = [asap_counts(20_000, seed) for seed in SEEDS]
    mean = sum(total_variation(counts, EXACT) for counts, _ in runs) / len(runs)
    assert mean <= 0.11 < 0.12 < total_variation(masked, EXACT)
    # The trie's bound falls towards the probability that an answer is legal, and never below it.
    for _, tries in runs:
        assert legal_probability() <= tries.root(("toy", hash(()))).rate < 0.85


def legal_probability() -> float:
    def walk(state: EvenFirst) -> float:
        chances = log_chances(state.text)
        found = math.exp(chances[END]) if state.is_accepting else 0.0
        for token_id in state.legal_ids().tolist():
            behind = state.fork()
            behind.advance(token_id)
            found += math.exp(chances[token_id]) * walk(behind)
        return found

    return walk(EvenFirst())


def test_a_weight_is_an_unbiased_estimate_of_the_legal_probability() -> None:
    sampler = sampler_of(params("awrs"))
    for text in ((), (0,), (1, 2, 1), (0, 2, 3), (1,), (0,) * 7):
        state = EvenFirst(text)
        chances = log_chances(text)
        legal = [*state.legal_ids().tolist(), *([END] if state.is_accepting else [])]
        if not legal:
            continue
        exact = sum(math.exp(chances[i]) for i in legal)
        drawn: Counter[int] = Counter()
        total = 0.0
        for _ in range(8000):
            of_one = ConstrainedAnswer(state.fork(), (END,), None)
            drawn[sampler.choose(logits_after(text), (), of_one)] += 1
            of_one.take(END)
            total += math.exp(of_one.log_weight)
        assert total / 8000 == pytest.approx(exact, abs=0.02)
        for token_id in legal:
            share = math.exp(chances[token_id]) / exact
            assert drawn[token_id] / 8000 == pytest.approx(share, abs=0.025)


def particles(
    number: int, sampler: Sampler, chooser: random.Random, tries: Tries
) -> list[tuple[tuple[int, ...], float]]:
    """Return the answers of one run of particles and their shares."""
    rules = [
        Aligned(EvenFirst(), tries, "toy", (END,), 1.0, asks_mask=False) for _ in range(number)
    ]
    states = [ConstrainedAnswer(one, (END,), None) for one in rules]
    for state in states:
        state.begin(())
    texts: list[list[int]] = [[] for _ in states]
    ended, failed = [False] * number, [False] * number
    while not all(ended):
        for i, state in enumerate(states):
            if ended[i]:
                continue
            try:
                token_id = sampler.choose(logits_after(texts[i]), texts[i], state)
            except NoLegalToken:
                ended[i] = failed[i] = True
                continue
            state.take(token_id)
            ended[i] = token_id == END
            texts[i] += [] if ended[i] else [token_id]
        weights = [
            -math.inf if bad else one.log_weight for bad, one in zip(failed, states, strict=True)
        ]
        if needs_resampling(weights):
            found, mean = ancestors(weights, chooser), mean_log_weight(weights)
            states = [states[i].fork() for i in found]
            texts = [list(texts[i]) for i in found]
            ended, failed = [ended[i] for i in found], [False] * number
            for state in states:
                state.log_weight = mean
    weights = [
        -math.inf if bad else one.log_weight for bad, one in zip(failed, states, strict=True)
    ]
    return list(zip(map(tuple, texts), normalised(weights), strict=False))


def test_five_particles_come_close_to_the_exact_distribution() -> None:
    sampler, chooser, tries = sampler_of(params("awrs")), random.Random(2), Tries()
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(4000):
        for text, share in particles(5, sampler, chooser, tries):
            counts[text] += share  # type: ignore[assignment]
    assert total_variation(counts, EXACT) <= 0.09
    assert perfect_variation(20_000, EXACT) > 0.07


def test_the_tries_stay_inside_their_bound() -> None:
    tries = Tries()
    for key in range(40):
        node = tries.root(key)
        for token_id in range(1000):
            child = tries.add(key, node, token_id, 0.5)
            node = node if child is None else child
    assert sum(tries._num_nodes.values()) <= MAX_NODES
    assert 39 in tries._roots and 0 not in tries._roots
    long = tries.root("long")
    assert [tries.add("long", long, i, 0.1) is None for i in range(MAX_NODES + 1)][-1]


@pytest.mark.parametrize("sampling", ["asap", "awrs"])
def test_aligned_answers_follow_the_constraint(
    fake_runtime: Callable[..., Runtime], sampling: str
) -> None:
    runtime = fake_runtime("I think that it is 36.")
    for seed in range(8):
        result = runtime.generate(
            "Q\n", constraint=SCHEMA, sampling=sampling, temperature=2.0, seed=seed, max_tokens=30
        )
        assert isinstance(JsonSchema(SCHEMA).parse(result.text)["a"], int)
        assert (result.structured is not None) and ("log_weight" in result.structured) == (
            sampling == "awrs"
        )


def test_particles_of_a_batch(fake_runtime: Callable[..., Runtime]) -> None:
    runs = [
        # What a runtime learned of a prompt changes its next draws: each run has its own.
        fake_runtime('{"a": 3, "b": 4}').generate_batch(
            ["Q\n"] * 5,
            constraint=SCHEMA,
            sampling="awrs",
            temperature=8.0,
            seed=seed,
            max_tokens=24,
        )
        for seed in (1, 1, 2)
    ]
    assert [one.text for one in runs[0]] == [one.text for one in runs[1]]
    assert [one.text for one in runs[0]] != [one.text for one in runs[2]]
    for results in runs:
        assert len(results) == 5
        assert sum((one.structured or {})["weight"] for one in results) == pytest.approx(1)
        for one in results:
            assert isinstance(JsonSchema(SCHEMA).parse(one.text)["a"], int)
            assert one.stats.generated_tokens == len(one.token_ids) <= 24
            assert one.stats.prompt_tokens == runs[0][0].stats.prompt_tokens


def test_answers_that_had_to_be_closed_weigh_nothing_beside_complete_ones() -> None:
    tries = Tries()
    rules = Aligned(EvenFirst(), tries, "toy", (END,), 1.0)
    cut = ConstrainedAnswer(rules.fork(), (END,), None)
    cut.begin(())
    sampler = sampler_of(params("awrs"))
    while cut.constraint.is_accepting:
        cut.take(min(sampler.choose(logits_after(()), (), cut), 0))
    root = tries.root(("toy", hash(())))
    before = root.rate
    cut.close()
    complete = ConstrainedAnswer(EvenFirst((0, 0)), (END,), None)
    assert normalised([cut.log_weight, complete.log_weight]) == [0, 1]
    assert normalised([cut.log_weight, cut.log_weight]) == [0.5, 0.5]
    assert root.rate < before


def test_prompts_that_differ_are_no_particles(fake_runtime: Callable[..., Runtime]) -> None:
    results = fake_runtime("one two three").generate_batch(
        ["A\n", "B\n"], constraint=Length(max_words=2), sampling="awrs", temperature=1, seed=1
    )
    assert all("weight" not in (one.structured or {}) for one in results)
    assert all(len(one.text.split()) <= 2 for one in results)


def test_wrong_ways_to_sample_are_refused() -> None:
    for values, message in (
        ({"sampling": "other"}, "masked, asap"),
        ({"sampling": "asap", "temperature": 0}, "temperature is 0"),
    ):
        with pytest.raises(BadOption, match=message):
            SamplingParams(**values)  # type: ignore[arg-type]
