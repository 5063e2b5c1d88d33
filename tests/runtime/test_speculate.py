"""The loop with drafts against the loop without: the same tokens, texts, endings and cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculating import DEAR, BranchingDraft, ToldDraft, mixed_tree, speculator_of

from lowtide import FakeModel, GenerationChunk, Runtime
from lowtide.models.draft_tree import TokenTree
from lowtide.models.fake_model import TURN_END
from lowtide.runtime.speculation.drafts import NgramDraft, TrigramDraft
from lowtide.runtime.speculation.speculator import Speculator

REPLY = "the tide comes in, the tide goes out, the tide comes in again."


def opened(
    speculator: Speculator | None = None, reply: str = REPLY, context: int = 512
) -> tuple[Runtime, FakeModel]:
    model = FakeModel([reply], context=context)
    runtime = Runtime.open(model, memory="8GiB")
    runtime._loaded.speculator = speculator
    return runtime, model


def ask(runtime: Runtime, prompt: str = "Say it.\n", **options: Any) -> list[GenerationChunk]:
    return list(runtime.stream(prompt, **{"temperature": 0, **options}))


def told(pieces: Sequence[GenerationChunk]) -> list[tuple[str, int | None, str | None]]:
    return [(piece.text, piece.token_id, piece.finish_reason) for piece in pieces]


def oracle(reply: str = REPLY) -> ToldDraft:
    """A draft that knows the reply, and what ends it."""
    tokens = [*reply.encode(), TURN_END]

    def rest(text: Sequence[int]) -> Sequence[int]:
        said = list(reversed(text)).index(ord("\n"))
        return tokens[said:]

    return ToldDraft(rest)


def branching(seed: int) -> BranchingDraft:
    """A draft whose trees have the reply's next tokens somewhere in them."""
    chance = random.Random(seed)
    right = oracle()

    def tree(text: Sequence[int]) -> TokenTree:
        right.follow(text)
        return mixed_tree(right.propose(8).token_ids, chance.randrange(1 << 30))

    return BranchingDraft(tree)


def half_right(seed: int) -> ToldDraft:
    """A draft that is right for a random number of tokens and then says anything."""
    chance = random.Random(seed)
    right = oracle()

    def mixed(text: Sequence[int]) -> Sequence[int]:
        right.follow(text)
        rest = right.propose(chance.randrange(6)).token_ids
        return (*rest, *(chance.randrange(-3, 300) for _ in range(chance.randrange(5))))

    return ToldDraft(mixed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    max_tokens=st.integers(1, 80),
    stop=st.sampled_from([(), ("goes",), ("tide comes in again",), ("zz",)]),
    temperature=st.sampled_from([0, 0.8, 5.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    context=st.sampled_from([512, 40]),
)
def test_answers_are_those_of_the_plain_loop(
    seed: int,
    max_tokens: int,
    stop: tuple[str, ...],
    temperature: float,
    penalty: float,
    context: int,
) -> None:
    options = {
        "max_tokens": max_tokens,
        "stop": stop,
        "temperature": temperature,
        "repeat_penalty": penalty,
        "seed": seed,
    }
    plain, _ = opened(context=context)
    drafting, model = opened(speculator_of(half_right(seed), NgramDraft()), context=context)
    for _ in range(2):
        assert told(ask(drafting, **options)) == told(ask(plain, **options))
    assert drafting._session.token_ids == plain._session.token_ids
    assert model._tokens[: len(plain._session.token_ids)] == plain._session.token_ids


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    max_tokens=st.integers(1, 80),
    temperature=st.sampled_from([0, 0.8, 5.0]),
    context=st.sampled_from([512, 40]),
)
def test_answers_behind_trees_of_any_shape_are_those_of_the_plain_loop(
    seed: int, max_tokens: int, temperature: float, context: int
) -> None:
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    plain, unhelped = opened(context=context)
    drafting, model = opened(speculator_of(branching(seed)), context=context)
    for _ in range(2):
        assert told(ask(drafting, **options)) == told(ask(plain, **options))
    assert drafting._session.token_ids == plain._session.token_ids
    drafting._session.sync()
    plain._session.sync()
    assert model._tokens == unhelped._tokens


def test_branches_are_accepted_and_counted() -> None:
    runtime, _ = opened(speculator_of(branching(3)))
    stats = ask(runtime)[-1].stats.speculation
    assert stats is not None and stats["accepted"] >= stats["accepted_on_branches"] > 0


def test_a_draft_that_knows_the_answer_saves_passes() -> None:
    runtime, model = opened(speculator_of(oracle()))
    stats = ask(runtime)[-1].stats.speculation
    assert stats is not None
    assert stats["accepted"] >= len(REPLY) - 1 - stats["rounds"]
    assert len(model.rows) <= 2 + -(-len(REPLY) // 8) + 2
    assert max(rows for rows, _ in stats["rows"]) == 8 and stats["mean_accepted"] > 5
    assert stats["off_reason"] is None and stats["identical"]


@pytest.mark.parametrize("draft", [NgramDraft, TrigramDraft])
def test_our_own_drafts_save_passes_where_a_text_repeats(draft: Callable[[], Any]) -> None:
    reply = "one two three four. " * 8
    runtime, model = opened(speculator_of(draft()), reply=reply)
    plain, unhelped = opened(reply=reply)
    assert told(ask(runtime)) == told(ask(plain))
    assert len(model.rows) < 0.5 * len(unhelped.rows)


def test_where_nothing_pays_every_step_is_plain_and_the_reason_is_told() -> None:
    runtime, model = opened(speculator_of(oracle(), cost=DEAR))
    stats = ask(runtime)[-1].stats.speculation
    assert max(model.rows[1:]) == 1
    assert stats is not None and stats["rounds"] == 0
    assert "promised to pay" in stats["off_reason"]


@pytest.mark.parametrize(
    "says", [lambda _text: (), lambda _text: 1 / 0, lambda _text: (-5, 1 << 40)]
)
def test_a_draft_with_nothing_garbage_or_an_error_to_say_changes_nothing(
    says: Callable[[Sequence[int]], Any],
) -> None:
    runtime, _ = opened(speculator_of(ToldDraft(says)))
    plain, _ = opened()
    assert told(ask(runtime)) == told(ask(plain))


def test_a_cancel_in_the_middle_of_a_round_leaves_the_plain_loops_cache() -> None:
    runtime, model = opened(speculator_of(oracle()))
    plain, unhelped = opened()
    for taken in (2, 3, 7, 12):
        for one in (runtime, plain):
            pieces = one.stream("Say it.\n", temperature=0)
            for _ in range(taken):
                next(pieces)
            pieces.close()
        assert runtime._session.token_ids == plain._session.token_ids
        assert model.num_tokens >= unhelped.num_tokens
        runtime._session.sync()
        assert model._tokens == unhelped._tokens
    assert told(ask(runtime)) == told(ask(plain))


def test_another_conversation_is_not_confused_with_the_one_before() -> None:
    runtime, _ = opened(speculator_of(NgramDraft(), TrigramDraft()))
    plain, _ = opened()
    for prompt in ("Say it.\n", "Then say it once more.\n", "Say it.\n", "S\n"):
        assert told(ask(runtime, prompt)) == told(ask(plain, prompt))


def test_without_room_in_the_plan_it_says_so_and_answers() -> None:
    runtime, _ = opened(Speculator.without("the plan has no room for it"))
    stats = ask(runtime)[-1].stats.speculation
    assert stats is not None and stats["off_reason"] == "the plan has no room for it"


def test_closing_the_runtime_closes_the_drafts() -> None:
    draft = oracle()
    runtime, _ = opened(speculator_of(draft))
    runtime.close()
    assert draft.is_closed
