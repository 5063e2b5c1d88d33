"""Schemas that only a validator can check: answers are valid, wrong attempts are not repeated, and all is bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide import FakeModel, JsonSchema, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.structured.verified.attempts import MAX_ATTEMPTS, Attempt, bare
from lowtide.runtime.structured.verified.linear_match import matches
from lowtide.runtime.structured.verified.validator import Validator
from lowtide.runtime.structured.vocabulary import TokenVocabulary

DIGITS = {
    "type": "array",
    "items": {"enum": [1, 2, 3]},
    "uniqueItems": True,
    "minItems": 3,
    "maxItems": 3,
}
GREEDY = SamplingParams(temperature=0, max_tokens=80)
VOCABULARY = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)


def verified(schema: Any, style: str = "flexible") -> JsonSchema:
    return JsonSchema(schema, style, check="verified")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_wrong_answers_are_tried_again(
    fake_runtime: Callable[..., Runtime], temperature: float
) -> None:
    result = fake_runtime("[1, 1, 1]").generate(
        "Q\n", constraint=verified(DIGITS), temperature=temperature, seed=3, max_tokens=80
    )
    jsonschema.validate(json.loads(result.text), DIGITS)
    assert result.structured is not None and result.structured["enforced"] == "verified"
    assert 1 <= result.structured["attempts"] <= MAX_ATTEMPTS


def test_a_right_answer_takes_one_attempt(fake_runtime: Callable[..., Runtime]) -> None:
    result = fake_runtime("[3, 1, 2]").generate("Q\n", GREEDY, constraint=verified(DIGITS))
    assert (result.text, result.finish_reason) == ("[3, 1, 2]", "stop")
    assert result.structured is not None and result.structured["attempts"] == 1


def test_a_schema_that_a_grammar_holds_stays_exact(fake_runtime: Callable[..., Runtime]) -> None:
    result = fake_runtime("true").generate("Q\n", GREEDY, constraint=verified({"type": "boolean"}))
    assert result.structured is not None and result.structured["enforced"] == "exact"


def test_what_no_answer_follows_is_an_error(fake_runtime: Callable[..., Runtime]) -> None:
    schema = {"enum": ["a", "b"], "not": {"type": "string"}}
    with pytest.raises((ConstraintFailed, BadOption), match="answer"):
        fake_runtime("a").generate("Q\n", GREEDY, constraint=verified(schema))


def test_max_tokens_closes_with_a_valid_answer(fake_runtime: Callable[..., Runtime]) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 2}
    result = fake_runtime("[1, 2, " + "3" * 90).generate(
        "Q\n", GREEDY, constraint=verified(schema), max_tokens=20
    )
    jsonschema.validate(json.loads(result.text), schema)
    assert len(result.token_ids) <= 20


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=12)
def test_every_verified_answer_is_valid(seed: int, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"a": DIGITS, "b": {"type": "string", "maxLength": 3, "not": {"const": "x"}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    runtime = Runtime.open(FakeModel(['{"a": [1, 1, 2], "b": "x"}']), memory="8GiB")
    result = runtime.generate(
        "Q\n", constraint=verified(schema), seed=seed, temperature=temperature, max_tokens=120
    )
    jsonschema.validate(json.loads(result.text), schema)


def test_no_attempt_repeats_another() -> None:
    attempt = verified(DIGITS).compile(VOCABULARY)
    assert isinstance(attempt, Attempt)
    written: list[str] = []
    for _ in range(6):  # always the smallest legal byte, and no white space
        text = b""
        while not attempt.is_accepting:
            legal = [i for i in attempt.legal_ids().tolist() if not chr(i).isspace()]
            attempt.advance(legal[0])
            text += bytes([legal[0]])
        written.append(text.decode())
        again = attempt.retry()
        if again is None:
            break
        attempt = again
    assert len(set(written)) == len(written) > 1
    jsonschema.validate(json.loads(written[-1]), DIGITS)


@pytest.mark.parametrize(
    ("schema", "text", "ending"),
    [
        ({"uniqueItems": True}, '{"x": 1}', None),
        ({"properties": {"a": DIGITS}}, '{"a": [1, 1, 2], "b": 3}', '{"a": [1, 1, 2]'),
        ({"items": {"not": {"const": "é"}}}, '["a", "é", "c"]', '["a", "é"'),
        ({"items": {"items": {"not": {"const": 7}}}}, "[[1], [2 , 7 ,8]]", "[[1], [2 , 7"),
        ({"minProperties": 2}, '{"a": 1}', '{"a": 1}'),
        ({"properties": {"a": {"not": {"const": 2}}}}, '{"a": 1, "a": 2}', '{"a": 1, "a": 2'),
        ({"properties": {"a": {"pattern": "^b+$"}}}, '{"a": "c"}', '{"a": "c"'),
        ({"properties": {"a": {"pattern": "b"}}}, '{"a": "abc"}', None),
    ],
)
def test_where_an_answer_stops_following_its_schema(
    schema: Any, text: str, ending: str | None
) -> None:
    found = Validator(schema).violation(text.encode())
    assert (found and text.encode()[: found.end].decode()) == ending


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.org/schema.json", "not": {}},
        {"minLength": "long", "not": {}},
        {"properties": {"a": {"uniqueItems": 3}}, "not": {}},
    ],
)
def test_what_cannot_be_checked_is_one_sentence(schema: Any) -> None:
    with pytest.raises(BadOption) as refused:
        verified(schema).compile(VOCABULARY)
    assert "\n" not in str(refused.value)


def test_patterns_are_matched_in_linear_time() -> None:
    started = time.process_time()
    assert not matches("^(a+)+$", "a" * 2000 + "b")
    assert time.process_time() - started < 2
    assert matches("^(a+)+$", "aaa") and matches("b", "abc") and not matches("^b", "abc")
    with pytest.raises(BadOption, match="linear time"):
        matches("(?=a)b", "b")


@given(st.recursive(st.none() | st.text(max_size=4) | st.integers(), st.lists, max_leaves=5))
def test_bare_text_has_the_white_space_of_strings_alone(value: Any) -> None:
    text = json.dumps({"k y": value}, indent=2).encode()
    assert bare(text) == json.dumps({"k y": value}, separators=(",", ":")).encode()
    for cut in range(len(text)):
        assert bare(bare(text[:cut])) == bare(text[:cut])
