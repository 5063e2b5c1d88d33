"""Log probabilities against the softmax, and their way through an answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import FakeModel, Runtime
from lowtide.runtime.generation.logprobs import LogprobMeter


@given(
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40), st.data(), st.integers(0, 20)
)
def test_they_are_the_softmax_of_the_logits(
    values: list[float], data: st.DataObject, num_top: int
) -> None:
    logits = np.array(values, np.float32)
    token_id = data.draw(st.integers(0, len(values) - 1))
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    found = LogprobMeter(num_top, lambda one: bytes([one])).measure(logits, token_id)
    assert (found.token_id, found.token) == (token_id, bytes([token_id]))
    assert found.logprob == pytest.approx(exact[token_id], abs=1e-4)
    assert len(found.top) == min(num_top, len(values))
    assert [one.logprob for one in found.top] == pytest.approx(
        np.sort(exact)[::-1][: len(found.top)].tolist(), abs=1e-4
    )
    assert logits.tolist() == np.array(values, np.float32).tolist()


def test_every_token_of_an_answer_has_one_that_nothing_changes() -> None:
    with Runtime.open(FakeModel(["Hello."]), memory="8GiB") as runtime:
        plain = runtime.generate("Hi\n", temperature=0, logprobs=3)
        biased = runtime.generate(
            "Hi\n", temperature=0.5, seed=1, logprobs=3, logit_bias={ord("H"): 5}
        )
        without = runtime.generate("Hi\n", temperature=0)
    assert without.logprobs is None
    assert plain.logprobs is not None and biased.logprobs is not None
    assert [one.token_id for one in plain.logprobs] == list(plain.token_ids)
    assert [one.top[0].token_id for one in plain.logprobs] == list(plain.token_ids)
    assert plain.logprobs[0] == biased.logprobs[0]
