"""Aligned sampling of the default model: answers are likelier under the model than those of masking."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from lowtide import Choice, Runtime

PROMPT = "My favourite fruit is the"
CHOICES = (
    " apple",
    " big red banana",
    " banana",
    " orange because it is salty",
    " orange with a purple engine",
    " mango",
    " one with the wheels",
    " pineapple of the sea",
    " strawberry",
    " same as the king of France",
)
NUM_ANSWERS = 100


def log_likelihood(runtime: Runtime, text: str) -> float:
    """Return the logarithm of a text's probability under the model."""
    only = Choice(text, "\x01")
    result = runtime.generate(PROMPT, constraint=only, temperature=0, logprobs=0)
    assert result.text == text and result.logprobs is not None
    return sum(one.logprob for one in result.logprobs)


@pytest.mark.parametrize("sampling", ["asap", "awrs"])
def test_answers_are_as_likely_as_the_model_has_them(real_runtime: Runtime, sampling: str) -> None:
    likelihood = {text: log_likelihood(real_runtime, text) for text in CHOICES}
    total = sum(map(math.exp, likelihood.values()))
    exact = {text: math.exp(one) / total for text, one in likelihood.items()}

    def drawn(sampling: str, seed: int) -> Counter[str]:
        values = {"constraint": Choice(*CHOICES), "temperature": 1.0, "max_tokens": 20}
        found: Counter[str] = Counter()
        if sampling == "awrs":
            for i in range(NUM_ANSWERS // 5):
                batch = real_runtime.generate_batch(
                    [PROMPT] * 5, sampling=sampling, seed=seed + i, **values
                )
                for one in batch:
                    found[one.text] += (one.structured or {})["weight"]
            return found
        whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for i in range(NUM_ANSWERS):
            found[
                real_runtime.generate(
                    PROMPT, sampling=sampling, seed=seed + i, **whole, **values
                ).text
            ] += 1
        return found

    def mean(counts: Counter[str]) -> float:
        return sum(count * likelihood[text] for text, count in counts.items()) / sum(
            counts.values()
        )

    def variation(counts: Counter[str]) -> float:
        number = sum(counts.values())
        return 0.5 * sum(abs(counts[text] / number - share) for text, share in exact.items())

    drawn(sampling, 1)  # what is learned from these answers is known to the next
    aligned, masked = drawn(sampling, 1000), drawn("masked", 1000)
    assert mean(aligned) > mean(masked) + 0.5
    assert variation(aligned) < variation(masked)
