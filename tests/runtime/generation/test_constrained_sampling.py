"""Sampling of constrained answers: the same tokens whether the mask is looked at for a few likely tokens or for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import SamplingParams
from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
from lowtide.runtime.generation import sampling
from lowtide.runtime.generation.sampling import Sampler
from lowtide.runtime.structured.answer import ConstrainedAnswer
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import JsonSchema, Regex
from lowtide.runtime.structured.vocabulary import TokenVocabulary


class Any300(Constraint):
    """Some of 300 tokens, again and again."""

    def __init__(self, legal: tuple[int, ...]) -> None:
        self._legal = legal

    def allows(self, token_id: int) -> bool:
        return token_id in self._legal

    def legal_ids(self) -> Any:
        return np.array(self._legal, np.int32)

    def advance(self, token_id: int) -> None:
        pass

    def fork(self) -> Any300:
        return self

    @property
    def is_accepting(self) -> bool:
        return True


@given(
    legal=st.sets(st.integers(0, 299), min_size=1, max_size=299).map(sorted).map(tuple),
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 3, 40]),
    temperature=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_few_likely_tokens_are_enough(
    legal: tuple[int, ...], seed: int, top_k: int, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, 300).astype(np.float32)
    params = SamplingParams(seed=seed, top_k=top_k, temperature=temperature)
    answer = ConstrainedAnswer(Any300(legal), (299,), None)
    found = Sampler(params).choose(logits, (), answer)
    allowed = np.array(sorted({*legal, 299}))
    if temperature == 0:
        assert found == allowed[logits[allowed].argmax()]
    else:
        assert found == allowed[Sampler(params).choose(logits[allowed], ())]


def test_without_the_mask_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ConstrainedAnswer(Any300(tuple(range(200))), (299,), None)
    monkeypatch.setattr(answer, "legal_ids", lambda: pytest.fail("all tokens were looked at"))
    logits = np.linspace(1, 0, 300, dtype=np.float32)
    logits[250] = 2.0
    assert Sampler(SamplingParams(temperature=0)).choose(logits, (), answer) == 0
    assert Sampler(SamplingParams(temperature=1.0, top_k=4)).choose(logits, (), answer) in range(4)
    assert sampling.MANY_TIMES > 1


@pytest.mark.parametrize(
    "form",
    [
        Regex("[a-z]{2}[0-9]+"),
        JsonSchema({"type": "object", "properties": {"a": {"enum": ["é", "ab", 1]}}}, "compact"),
    ],
)
def test_all_ways_to_ask_agree(form: Any) -> None:
    vocabulary = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)
    constraint = form.compile(vocabulary)
    chance = np.random.default_rng(1)
    for _ in range(12):
        every = np.arange(NUM_TOKENS + 3, dtype=np.int32)
        fresh = constraint.fork()
        asked = [one for one in range(NUM_TOKENS) if fresh.allows(one)]
        legal = constraint.legal_ids().tolist()
        among = every[constraint.legal_among(every)]
        assert asked == legal == [one for one in among if one not in vocabulary.end_ids]
        assert constraint.num_legal(legal[:1]) == min(len(legal), 1)
        if not legal:
            break
        constraint.advance(int(chance.choice(legal)))
