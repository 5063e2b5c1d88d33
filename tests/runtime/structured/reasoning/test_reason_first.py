"""Reasoning before an answer: it ends, and the answer behind it follows its format."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pieces import PieceTokenizer, random_answer

from lowtide import (
    AllOf,
    Avoid,
    Choice,
    FakeModel,
    JsonSchema,
    Must,
    ReasonFirst,
    Regex,
    Runtime,
    SamplingParams,
)
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.vocabulary import TokenVocabulary

GREEDY = SamplingParams(temperature=0, max_tokens=80)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
PIECES = ["An", "swer", "Answer", "Answer:", ":", ": 4", "er:", "er:\n", "\n", "\n\n", "yes", "no"]
VOCABULARY = TokenVocabulary(PieceTokenizer(PIECES), 300)


def opened(reply: str, **options: Any) -> Runtime:
    return Runtime.open(FakeModel([reply], context=512), memory="8GiB", **options)


class ThinkingTokenizer(PieceTokenizer):
    """Has control tokens for the markers of reasoning, which texts do not spell."""

    MARKERS = {"<think>": 290, "</think>": 291}

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        if parse_special and text in self.MARKERS:
            return [self.MARKERS[text]]
        return super().encode(text, add_special=add_special, parse_special=parse_special)


THINKING = TokenVocabulary(ThinkingTokenizer(PIECES), 300)


def test_both_parts_of_the_answer_are_told_apart() -> None:
    runtime = opened("It is 3 and 4. Answer:\nI say 7", structured=True)
    result = runtime.generate("Q\n", GREEDY, response_format=ReasonFirst(SCHEMA, 40))
    assert result.reasoning == "It is 3 and 4."
    assert result.text == f"It is 3 and 4. Answer:\n{result.answer}"
    assert result.parsed == JsonSchema(SCHEMA).parse(result.answer)
    assert result.structured is not None and result.structured["enforced"] == "exact"


@pytest.mark.parametrize("limit", [1, 5, 12])
def test_reasoning_ends_after_so_many_tokens(limit: int) -> None:
    runtime = opened("It goes on and on and never comes to an end.")
    result = runtime.generate("Q\n", GREEDY, constraint=ReasonFirst(Choice("yes", "no"), limit))
    assert result.answer in ("yes", "no") and result.reasoning is not None
    free = runtime.generate("Q\n", GREEDY, max_tokens=limit).text
    assert result.text.startswith(free) and result.reasoning == free.strip()


def test_where_the_model_would_end_its_answer_begins() -> None:
    runtime = opened("So it is.")
    result = runtime.generate("Q\n", GREEDY, constraint=ReasonFirst(Choice("yes", "no"), 60))
    assert result.text == f"So it is.\nAnswer:\n{result.answer}" and result.answer in ("yes", "no")
    assert result.finish_reason == "stop" and result.reasoning == "So it is."


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(30, 60), st.booleans())
def test_any_random_answer_has_both_parts(
    seed: int, limit: int, max_tokens: int, thinks: bool
) -> None:
    vocabulary = THINKING if thinks else VOCABULARY
    constraint = ReasonFirst(Choice("yes", "no"), limit).compile(vocabulary)
    constraint.begin([1, 2])
    text = random_answer(
        constraint, vocabulary, random.Random(seed), max_tokens=max_tokens, likely=b"Answer: yes\n"
    )
    gap = "\n\n" if thinks else "Answer:\n"
    before, found, answer = text.partition(gap) if not thinks else text.rpartition(gap)
    assert found and answer in ("yes", "no")
    assert thinks or "Answer:" not in before


def test_the_mask_is_what_is_allowed() -> None:
    for vocabulary in (VOCABULARY, THINKING):
        constraint = ReasonFirst(Choice("yes", "no"), 6).compile(vocabulary)
        constraint.begin([])
        chooser = random.Random(1)
        while not constraint.is_done:
            legal = constraint.legal_ids().tolist()
            assert legal == [i for i in range(vocabulary.num_tokens) if constraint.allows(i)]
            constraint.advance(chooser.choice(legal))


def test_a_marker_may_not_end_inside_a_token() -> None:
    constraint = ReasonFirst(Choice("yes"), 20).compile(VOCABULARY)
    constraint.begin([])
    ids = {piece: VOCABULARY.encode(piece.encode())[0] for piece in ("An", "er:", "er:\n", "yes")}
    for token_id in (ids["An"], *VOCABULARY.encode(b"sw")):
        constraint.advance(token_id)
    assert constraint.allows(ids["er:"]) and not constraint.allows(ids["er:\n"])
    constraint.advance(ids["er:"])
    assert VOCABULARY.decode(constraint.forced()) == b"\n" and not constraint.is_accepting


def test_a_model_that_thinks_begins_with_its_own_marker() -> None:
    begins, ends = ThinkingTokenizer.MARKERS.values()
    constraint = ReasonFirst(Choice("yes"), 20).compile(THINKING)
    constraint.begin([5, begins, 7, ends])  # an earlier turn
    assert constraint.forced()[0] == begins
    opened = ReasonFirst(Choice("yes"), 20).compile(THINKING)
    opened.begin([5, begins])
    assert not opened.forced() and opened.allows(ends)
    opened.advance(ends)
    assert THINKING.decode(opened.forced()) == b"\n\n"


def test_copies_do_not_share_the_answer() -> None:
    constraint = ReasonFirst(Choice("yes", "no"), 1).compile(VOCABULARY)
    constraint.begin([])
    constraint.advance(VOCABULARY.encode(b"yes")[0])
    for token_id in constraint.forced()[:-1]:
        constraint.advance(token_id)
    copies = [constraint.fork(), constraint.fork()]
    for copy, text in zip(copies, (b"yes", b"no"), strict=True):
        for token_id in (*copy.forced(), *VOCABULARY.encode(text)):
            copy.advance(token_id)
        assert copy.is_done
    assert not constraint.is_accepting


@pytest.mark.parametrize("max_tokens", [40, 44, 60, 120])
@pytest.mark.parametrize("speculate", ["off", "ngram"])
def test_closed_answers_are_whole_and_drafts_change_nothing(
    max_tokens: int, speculate: str
) -> None:
    text = "one two one two one two Answer:\n one two one two one two one two"
    form = ReasonFirst(AllOf(SCHEMA, Avoid("77")), 16)
    plain = opened(text, structured=True)
    drafted = opened(text, structured=True, speculate=speculate)
    results = [
        one.generate("one two\n", GREEDY, constraint=form, max_tokens=max_tokens)
        for one in (plain, drafted)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert isinstance(results[0].parsed["n"], int) and len(results[0].token_ids) <= max_tokens


def test_answers_of_a_batch_and_of_a_chat_are_those_alone() -> None:
    runtime = opened("I think so. Answer:\nno", sequences=2)
    form = ReasonFirst(Choice("yes", "no"), 20)
    alone = runtime.generate("Q\n", GREEDY, constraint=form)
    both = runtime.generate_batch(["Q\n", "Q\n"], GREEDY, constraint=form)
    assert [one.token_ids for one in both] == [alone.token_ids] * 2
    assert [(one.reasoning, one.answer) for one in both] == [("I think so.", alone.answer)] * 2
    submitted = runtime.submit([{"role": "user", "content": "Q"}], GREEDY, constraint=form).result()
    assert submitted.answer in ("yes", "no") and submitted.reasoning == "I think so."


@pytest.mark.parametrize("sampling", ["masked", "asap", "awrs"])
def test_it_goes_with_every_way_of_sampling(sampling: str) -> None:
    runtime = opened("I think so. Answer:\nno")
    form = ReasonFirst(Must("tide"), 8, end="###")
    result = runtime.generate(
        "Q\n", constraint=form, sampling=sampling, temperature=0.8, seed=3, max_tokens=40
    )
    assert "tide" in result.answer and "###" not in (result.reasoning or "")


def test_a_wrong_answer_is_tried_again_with_its_reasoning() -> None:
    form = JsonSchema({"type": "integer", "not": {"const": 0}}, check="verified")
    runtime = opened("It is nothing. Answer:\n0", structured=True)
    result = runtime.generate("Q\n", GREEDY, constraint=ReasonFirst(form, 40))
    assert result.structured is not None and result.structured["attempts"] > 1
    assert result.reasoning == "It is nothing." and result.parsed != 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "reason is 0"),
    ({"end": ""}, "0 bytes; it must have 1 to 64"),
    ({"end": "x" * 65}, "65 bytes"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        ReasonFirst(Regex("a"), **options)


def test_reasoning_must_leave_room_for_the_answer() -> None:
    with pytest.raises(BadOption, match="reasoning may take 80 tokens"):
        opened("x").generate("Q\n", GREEDY, constraint=ReasonFirst(Choice("a"), 80))
