"""What llguidance would read differently from JSON Schema: dates that do not exist, and keywords beside `$ref`."""

from __future__ import annotations

import json
from datetime import date
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import JsonSchema
from lowtide.runtime.structured.grammar.enforceable import enforceable
from lowtide.runtime.structured.vocabulary import TokenVocabulary

VOCABULARY = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)
DATE = {"type": "string", "format": "date"}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2020 = "https://json-schema.org/draft/2020-12/schema"
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


@cache
def compiled(schema: str) -> Constraint:
    return JsonSchema(schema).compile(VOCABULARY)


def accepts(schema: Any, value: Any) -> bool:
    constraint, data = compiled(json.dumps(schema)).fork(), json.dumps(value).encode()
    if constraint.num_legal(data) < len(data):
        return False
    for byte in data:
        constraint.advance(byte)
    return constraint.is_accepting


def exists(written: str) -> bool:
    try:
        date.fromisoformat(written)
    except ValueError:
        return False
    return True


@given(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32))
def test_a_date_is_accepted_if_it_exists(year: int, month: int, day: int) -> None:
    written = f"{year:04}-{month:02}-{day:02}"
    assert accepts(DATE, written) == exists(written)


@given(st.sampled_from([0, 1, 4, 96, 100, 104, 400, 1900, 2000, 2023, 2024, 2100, 9996]))
def test_the_last_day_of_february(year: int) -> None:
    written = f"{year:04}-02-29"
    assert accepts(DATE, written) == exists(written)
    moment = {"type": "string", "format": "date-time"}
    assert accepts(moment, f"{written}T10:00:00Z") == exists(written)


@given(st.dates())
def test_every_date_that_exists_is_accepted(day: date) -> None:
    assert accepts(DATE, day.isoformat())
    assert accepts({**DATE, "pattern": "^[0-9]"}, day.isoformat())
    assert accepts({"anyOf": [DATE, {"type": "null"}]}, day.isoformat())


def test_dates_keep_the_other_rules_of_their_schema() -> None:
    both = {**DATE, "pattern": "^2"}
    assert accepts(both, "2024-02-29") and not accepts(both, "2023-02-29")
    assert not accepts(both, "1999-01-01")
    assert accepts({"format": "date"}, 5)
    assert accepts({"type": ["string", "null"], "format": "date"}, None)


def test_data_that_look_like_a_schema_stay_as_they_are() -> None:
    value = {"format": "date", "$ref": "#/no"}
    assert enforceable({"const": value}) == {"const": value}
    named = {"properties": {"enum": DATE, "format": {"const": "date"}}}
    changed = enforceable(named)
    assert "pattern" in changed["properties"]["enum"]
    assert changed["properties"]["format"] == {"const": "date"}


def test_what_is_named_like_a_bound_stays() -> None:
    half = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    value = {"exclusiveMinimum": 0}
    schema = {
        "type": "object",
        "properties": {
            "half": half,
            "exclusiveMinimum": False,
            "same": {"const": value},
            "one": {"enum": [value, 1]},
        },
        "additionalProperties": False,
    }
    for answer in (
        *({"half": number} for number in (0, 0.25)),
        {"exclusiveMinimum": 1},
        *({name: one} for name in ("same", "one") for one in (value, {"minimum": 1e-15})),
    ):
        assert accepts(schema, answer) == jsonschema.Draft202012Validator(schema).is_valid(answer)
    assert accepts(schema, {"same": value})


@pytest.mark.parametrize("draft", [DRAFT_7, DRAFT_2020])
def test_keywords_beside_a_reference_count_as_the_draft_says(draft: str) -> None:
    schema = {
        "$schema": draft,
        "type": "object",
        "properties": {"at": {"type": "string", "minLength": 3, "$ref": "#/definitions/point"}},
        "required": ["at"],
        "additionalProperties": False,
        "definitions": {"point": {**POINT, "type": ["object", "string"]}},
    }
    validator = jsonschema.validators.validator_for(schema)(schema)
    for value in ({"x": 1}, "abc", "a"):
        assert accepts(schema, {"at": value}) == validator.is_valid({"at": value}), value


def test_what_a_reference_leads_into_stays() -> None:
    schema = {"$schema": DRAFT_7, "$ref": "#/properties/x", "properties": {"x": {"type": "null"}}}
    assert accepts(schema, None) and not accepts(schema, "text")
