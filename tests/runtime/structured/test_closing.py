"""Answers of many kinds of schemas can be closed wherever they are cut, and the closed text is valid."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pieces import PieceTokenizer

from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
from lowtide.runtime.structured.answer import NEAR_TOKENS, ConstrainedAnswer
from lowtide.runtime.structured.formats import JsonSchema, Regex
from lowtide.runtime.structured.grammar.advice import START
from lowtide.runtime.structured.vocabulary import TokenVocabulary

VOCABULARY = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)
END = VOCABULARY.end_ids[0]


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


IDENTIFIER = "[a-f0-9]{8}-[a-f0-9]{4}-[a-f0-9]{12}"
DEEP = {f"p{i}": {"type": "string", "minLength": 1} for i in range(120)}
CASES: list[tuple[Any, Any]] = [
    (an_object(id={"type": "string", "pattern": IDENTIFIER}), {"id": "x0a1b2c3d-ab12-" + "f" * 12}),
    (an_object(v={"type": "string", "pattern": "^[0-9]+-[0-9]+-[0-9]+$"}), {"v": "12-3-45"}),
    (an_object(m={"type": "string", "pattern": r"[\w-]+:[0-9a-f-]+"}), {"m": "ab-c:12ef"}),
    (an_object(u={"type": "string", "pattern": r"^(https?://)?[\da-z.-]+\.[a-z.]{2,6}$"}), {"u": "a.b.de"}),
    (an_object(t={"type": "string", "minLength": 300}), {"t": "lorem " * 60}),
    (an_object(d={"type": "string", "format": "date-time"}), {"d": "2024-02-29T23:59:60.5+05:30"}),
    (an_object(i={"type": "string", "format": "ipv6"}), {"i": "2001:db8::8a2e:370:7334"}),
    (an_object(e={"type": "string", "format": "email"}), {"e": "a.b@c.de"}),
    (an_object(q={"type": "string", "pattern": '^"[a-z]\\\\$'}), {"q": '"z\\'}),
    (an_object(**DEEP), {name: "é" for name in DEEP}),
    (
        {
            "type": "object",
            "properties": {"next": {"$ref": "#"}, "value": {"type": "integer"}},
            "required": ["value"],
            "additionalProperties": False,
        },
        {"next": {"next": {"value": 1}, "value": 2}, "value": 3},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), CASES)
@pytest.mark.parametrize("style", ["flexible", "pretty"])
def test_an_answer_is_closed_from_every_point(schema: Any, value: Any, style: str) -> None:
    jsonschema.validate(value, schema)
    constraint = JsonSchema(schema, style).compile(VOCABULARY)
    text = json.dumps(value, ensure_ascii=False).encode()
    step = max(len(text) // 40, 1)
    for at, byte in enumerate(text):
        if at % step == 0:
            closing = constraint.closing(2000)
            assert closing is not None, text[:at]
            jsonschema.validate(json.loads(text[:at] + bytes(closing)), schema)
        assert constraint.allows(byte), text[: at + 1]
        constraint.advance(byte)
    assert constraint.is_accepting


def test_a_regular_expression_is_closed_from_every_point() -> None:
    form = Regex("(?:[A-Z]{2}[0-9]{6},){3}end[.]")
    constraint, text = form.compile(VOCABULARY), b"AB123456,CD123456,EF123456,end."
    for at, byte in enumerate(text):
        closing = constraint.closing(100)
        assert closing is not None and re.fullmatch(
            form.pattern, (text[:at] + bytes(closing)).decode()
        )
        constraint.advance(byte)


@pytest.mark.parametrize("max_tokens", [NEAR_TOKENS // 2, NEAR_TOKENS * 3])
def test_the_tokens_for_closing_are_reserved(max_tokens: int) -> None:
    schema = an_object(
        list={"type": "array", "items": an_object(id=CASES[0][0]["properties"]["id"])}
    )
    answer = ConstrainedAnswer(JsonSchema(schema).compile(VOCABULARY), [END], max_tokens)
    written = bytearray()
    for byte in b'{"list": [' + b'{"id": "0a1b2c3d-ab12-ffffffffffff"}, ' * 100:
        if not answer.take(byte):
            break
        written.append(byte)
    assert answer.is_closed and len(written) > max_tokens - NEAR_TOKENS
    written += bytes(answer.close())
    assert len(written) <= max_tokens
    jsonschema.validate(json.loads(written), schema)


def test_the_place_in_a_json_text() -> None:
    text = b'{"a\\"b": [1, {"c": "d'
    places = [START.after(text[:at]) for at in range(len(text) + 1)]
    assert [at for at, place in enumerate(places) if place.string_at is not None] == [
        *range(2, 7), 15, 16, 20, 21,
    ]  # fmt: skip
    assert places[-1].containers == b"{[{" and not places[-1].is_key
    assert places[15].is_key and places[2].is_key
    assert places[5].after(text) == places[-1]


GROWN = TokenVocabulary(
    PieceTokenizer(
        ['","', '":', '{"', '"}', "]}", '": "', ', "', "12", "34,", "ab", " ", "  ", "true"]
    ),
    300,
)


@given(
    st.sampled_from(
        [
            {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
             "required": ["a", "b"], "additionalProperties": False},
            {"type": "array", "items": {"type": ["string", "integer", "boolean"]}, "minItems": 2},
            {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
            {"type": "integer", "multipleOf": 7},
            {"type": "string", "pattern": "^a+b$"},
        ]
    ),
    st.sampled_from(["flexible", "pretty", "compact"]),
    st.integers(0, 10_000),
)  # fmt: skip
def test_what_is_left_of_a_known_way_is_one(schema: Any, style: str, seed: int) -> None:
    numbers = random.Random(seed)
    state = JsonSchema(schema, style).compile(GROWN)
    closing = state.closing(100)
    for _ in range(30):
        assert closing is not None and state.ends(closing)
        legal = state.legal_ids().tolist()
        if not legal:
            break
        follows = closing[:1] if closing and numbers.random() < 0.4 else ()
        token_id = follows[0] if follows else numbers.choice(legal)
        state.advance(token_id)
        found = state.closing_after(closing, token_id, 100)
        assert found is None or state.ends(found)
        closing = state.closing(100) if found is None else found
