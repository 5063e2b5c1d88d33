from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide import FakeModel
from lowtide.attention.policy import PassController
from lowtide.runtime.kv.session import KVSession

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@settings(max_examples=200)
@given(st.lists(IDS, min_size=1, max_size=6))
def test_rewinding_equals_starting_over(prompts: list[list[int]]) -> None:
    model = FakeModel(context=64)
    session = KVSession(model)
    for prompt in prompts:
        reused = session.truncate_to_prefix(prompt)
        assert reused < len(prompt)
        assert session.token_ids == prompt[:reused]
        logits = session.append(prompt[reused:])
        fresh = FakeModel(context=64)
        assert logits.tobytes() == fresh.forward(prompt).tobytes()
        assert model.num_tokens == len(prompt) == len(session.token_ids)


def test_a_pass_that_was_interrupted_leaves_nothing_behind() -> None:
    class Interrupted(FakeModel):
        def forward(self, token_ids):  # type: ignore[no-untyped-def]
            super().forward(token_ids)
            raise KeyboardInterrupt

    model = Interrupted(context=64)
    session = KVSession(model)
    with pytest.raises(KeyboardInterrupt):
        session.append([1, 2, 3])
    assert session.token_ids == [] and model.num_tokens == 3
    assert session.truncate_to_prefix([1, 2, 3, 4]) == 0
    assert model.num_tokens == 0


def test_a_model_that_cannot_go_back_starts_over() -> None:
    class Forward(FakeModel):
        def truncate(self, num_tokens: int) -> int:
            return super().truncate(num_tokens if num_tokens == self.num_tokens else 0)

    session = KVSession(Forward(context=64))
    session.append([1, 2, 3])
    assert session.truncate_to_prefix([1, 2, 9]) == 0
    assert session.token_ids == []


class Correcting(PassController):
    """Asks for correction every three tokens, and remembers what it was told."""

    correction_interval = 3

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin_prefill(self) -> None:
        self.told.append("prompt")

    def begin_decode(self) -> None:
        self.told.append("decode")


def test_decoded_tokens_are_computed_again_when_correction_is_due() -> None:
    model, controller = FakeModel(context=64, batch_size=2), Correcting()
    session = KVSession(model, controller)
    session.append([1, 2])
    for token_id in (3, 4):
        session.decode([token_id])
    assert session.exact_until == 2
    logits = session.decode([5])
    assert controller.told == ["prompt", *["decode"] * 3, *["prompt"] * 2]  # in passes of two rows
    assert session.token_ids == [1, 2, 3, 4, 5] and session.exact_until == 5
    assert logits.tobytes() == FakeModel(context=64).forward([1, 2, 3, 4, 5]).tobytes()
    session.decode([6])
    session.truncate_to_prefix([1, 2, 3, 9])
    assert session.exact_until == 3 == model.num_tokens


def test_a_prompt_after_inexact_tokens_does_not_make_them_exact() -> None:
    session = KVSession(FakeModel(context=64), PassController())
    session.append([1, 2])
    session.decode([3])
    session.append([4, 5])
    assert session.exact_until == 2


def test_full() -> None:
    session = KVSession(FakeModel(context=4))
    session.append([1, 2, 3])
    assert not session.is_full
    session.append([4])
    assert session.is_full
