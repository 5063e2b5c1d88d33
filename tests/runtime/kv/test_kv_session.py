"""KVSession over the fake model: its tokens and the model's cache agree, whatever happens in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import FakeModel
from lowtide.attention.policy import PassController
from lowtide.runtime.kv.session import KVSession

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@given(st.lists(IDS, min_size=1, max_size=6))
def test_reusing_a_prefix_equals_starting_over(prompts: list[list[int]]) -> None:
    model = FakeModel(context=64)
    session = KVSession(model)
    for prompt in prompts:
        num_reused = session.truncate_to_prefix(prompt)
        assert num_reused < len(prompt)
        assert session.token_ids == prompt[:num_reused]
        logits = session.append(prompt[num_reused:])
        fresh = FakeModel(context=64)
        assert logits.tobytes() == fresh.forward(prompt).tobytes()
        assert model.num_tokens == len(prompt) == len(session.token_ids)


def test_an_interrupted_pass_leaves_nothing_in_the_session() -> None:
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


def test_a_model_that_cannot_truncate_starts_over() -> None:
    class ForwardOnly(FakeModel):
        def truncate(self, num_tokens: int) -> int:
            return super().truncate(num_tokens if num_tokens == self.num_tokens else 0)

    session = KVSession(ForwardOnly(context=64))
    session.append([1, 2, 3])
    assert session.truncate_to_prefix([1, 2, 9]) == 0
    assert session.token_ids == []


class Correcting(PassController):
    """Asks for a correction every three tokens, and records the passes."""

    correction_interval = 3

    def __init__(self) -> None:
        self.passes: list[str] = []

    def begin_prefill(self) -> None:
        self.passes.append("prefill")

    def begin_decode(self) -> None:
        self.passes.append("decode")


def test_decoded_tokens_are_computed_again_when_a_correction_is_due() -> None:
    model, controller = FakeModel(context=64, batch_size=2), Correcting()
    session = KVSession(model, controller)
    session.append([1, 2])
    for token_id in (3, 4):
        session.decode_token(token_id)
    assert session.exact_until == 2
    logits = session.decode_token(5)
    # The correction takes passes of two tokens.
    assert controller.passes == ["prefill", *["decode"] * 3, *["prefill"] * 2]
    assert session.token_ids == [1, 2, 3, 4, 5] and session.exact_until == 5
    assert logits.tobytes() == FakeModel(context=64).forward([1, 2, 3, 4, 5]).tobytes()
    session.decode_token(6)
    session.truncate_to_prefix([1, 2, 3, 9])
    assert session.exact_until == 3 == model.num_tokens


def test_a_prompt_after_inexact_tokens_does_not_make_them_exact() -> None:
    session = KVSession(FakeModel(context=64), PassController())
    session.append([1, 2])
    session.decode_token(3)
    session.append([4, 5])
    assert session.exact_until == 2


def test_num_free_counts_down_to_a_full_context() -> None:
    session = KVSession(FakeModel(context=4))
    session.append([1, 2, 3])
    assert session.num_free() == 1
    session.append([4])
    assert session.num_free() == 0
    session.clear()
    assert session.num_free() == 4
