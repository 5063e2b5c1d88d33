"""Texts to avoid and to have, and lengths: they hold over the borders of tokens, alone and together."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pieces import PieceTokenizer, random_answer

from lowtide import AllOf, Avoid, Choice, Length, Must, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.length import LengthRule
from lowtide.runtime.structured.rules.must import MustRule
from lowtide.runtime.structured.vocabulary import TokenVocabulary

VOCABULARY = TokenVocabulary(
    PieceTokenizer(
        ["ab", "abc", "bca", "cab", " ab", "a b", "\u20ac", "\u3000", "x\u2003", "e", " e"]
    ),
    300,
)
GREEDY = SamplingParams(temperature=0, max_tokens=60)


def test_no_denied_text_appears_in_random_answers() -> None:
    denied = ("abc", "ca", "b b", "\u20acx")
    constraint = Avoid(*denied).compile(VOCABULARY)
    for seed in range(1000):
        text = random_answer(
            constraint, VOCABULARY, random.Random(seed), likely=b"abcx \xe2\x82\xac"
        )
        assert not any(one in text for one in denied)


def test_the_mask_is_what_the_rule_allows() -> None:
    rules = (Avoid("abc", "ca"), Must("ab", "e"), Length(max_words=3), Length(max_characters=4))
    for rule in rules:
        constraint = rule.compile(VOCABULARY)
        chooser = random.Random(3)
        for _ in range(30):
            legal = constraint.legal_ids().tolist()
            assert legal == [i for i in range(VOCABULARY.num_tokens) if constraint.allows(i)]
            if not legal:
                break
            constraint.advance(chooser.choice(legal))


def test_it_says_how_often_a_text_was_avoided(fake_runtime: Callable[..., Runtime]) -> None:
    result = fake_runtime("no eval, no eval").generate("Q\n", GREEDY, constraint=Avoid("eval"))
    assert "eval" not in result.text
    assert result.structured is not None and result.structured["avoided"] == 2
    unchanged = fake_runtime("fine").generate("Q\n", GREEDY, constraint=Avoid("eval"))
    assert (unchanged.text, unchanged.finish_reason) == ("fine", "stop")


def test_stop_texts_go_with_rules_that_do_not_say_where_an_answer_ends(
    fake_runtime: Callable[..., Runtime],
) -> None:
    result = fake_runtime("one. two").generate("Q\n", GREEDY, constraint=Avoid("x"), stop=("two",))
    assert result.text == "one. "
    with pytest.raises(BadOption, match="leave one of them out"):
        SamplingParams(stop=("a",), constraint=AllOf(Avoid("x"), Must("b")))


@pytest.mark.parametrize("max_tokens", [12, 20, 40])
def test_what_must_appear_appears(fake_runtime: Callable[..., Runtime], max_tokens: int) -> None:
    runtime = fake_runtime("I have nothing to say about that, sorry, or anything else.")
    result = runtime.generate("Q\n", GREEDY, constraint=Must("tide", "moon"), max_tokens=max_tokens)
    assert "tide" in result.text and "moon" in result.text
    assert result.finish_reason == "length" and len(result.token_ids) <= max_tokens


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4), st.text("ab"))
def test_the_ending_has_what_is_missing(texts: list[str], begun: str) -> None:
    texts = list(dict.fromkeys(texts))
    rule = MustRule([one.encode() for one in texts])
    state = rule.step(rule.start, begun.encode())
    assert rule.is_accepting(state) == all(one in begun for one in texts)
    whole = begun.encode() + rule.ending(state)
    assert all(one.encode() in whole for one in texts)


@given(st.text("a \u3000\u20ac\u2003\u2014\U0001f600\u00a0\n", max_size=12), st.integers(0, 5))
def test_words_and_characters_are_those_of_python(text: str, most: int) -> None:
    for unit, count in (("words", len(text.split())), ("characters", len(text))):
        rule = LengthRule(unit, count, None)
        state = rule.step(rule.start, text.encode())
        assert state is not None and rule.is_accepting(state)
        assert not LengthRule(unit, count + 1).is_accepting(state)
        limited = LengthRule(unit, 0, most).step((0, 0), text.encode())
        if count > most:
            assert limited is None
        elif unit == "characters" or text.rstrip() == text:
            assert limited is not None


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_random_answers_have_the_length(unit: str) -> None:
    constraint = Length(**{f"min_{unit}": 4, f"max_{unit}": 6}).compile(VOCABULARY)
    for seed in range(300):
        text = random_answer(
            constraint, VOCABULARY, random.Random(seed), likely=b"a \xe2\x80\x83\xe3\x80\xf0\x9f"
        )
        assert 4 <= len(text.split() if unit == "words" else text) <= 6


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1, 1), (9, 2), (9, 3)])
def test_rules_together_with_a_schema(
    fake_runtime: Callable[..., Runtime], temperature: float, seed: int
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    rules = AllOf(schema, Must("sea"), Avoid("e ", "no"), Length(max_characters=40))
    result = fake_runtime('{"a": "no one knows').generate(
        "Q\n", constraint=rules, temperature=temperature, seed=seed, max_tokens=50
    )
    value = rules.parse(result.text)["a"]
    assert "sea" in value and "e " not in result.text and "no" not in result.text
    assert len(result.text) <= 40


def test_rules_that_exclude_each_other_are_refused_first(
    fake_runtime: Callable[..., Runtime],
) -> None:
    runtime = fake_runtime()
    for rules in (
        AllOf(Must("eval"), Avoid("ev")),
        AllOf(Must("a long text"), Length(max_characters=5)),
        AllOf(Choice("yes", "no"), Avoid("e", "n")),
    ):
        with pytest.raises(BadOption, match="no answer was found"):
            runtime.generate("Q\n", constraint=rules)
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


def test_wrong_rules_are_refused() -> None:
    for wrong, message in (
        (lambda: Avoid(), "pass texts of a character"),
        (lambda: Avoid("a", ""), "pass texts of a character"),
        (lambda: Must(3), "must is 3"),
        (lambda: Must([str(i) for i in range(65)]), "at most 64"),
        (lambda: Length(), "pass max_words"),
        (lambda: Length(max_words=1, min_words=2), "raise it"),
        (lambda: Avoid(["ab" * 500] * 1 + [chr(300 + i) * 40 for i in range(4000)]), "pass fewer"),
        (lambda: AllOf(), "pass at least one"),
    ):
        with pytest.raises(BadOption, match=message):
            wrong()  # type: ignore[no-untyped-call]
