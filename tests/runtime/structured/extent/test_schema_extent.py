"""The extent of a schema: no valid JSON is shorter, and the keyword that asks for most is named."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lowtide.runtime.structured.extent.extent import MAX_SIZE
from lowtide.runtime.structured.extent.schema_extent import schema_extent

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 99), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


def _schema_around(value: Any, chance: Any) -> dict[str, Any]:
    """Return a schema that the value follows, with some keywords by chance."""
    schema: dict[str, Any] = {}
    if isinstance(value, str) and chance.random() < 0.7:
        schema = {"type": "string", "minLength": chance.randint(0, len(value))}
    elif isinstance(value, list):
        schema = {"type": "array", "minItems": chance.randint(0, len(value))}
        if value and chance.random() < 0.5:
            schema["prefixItems"] = [_schema_around(one, chance) for one in value[:2]]
    elif isinstance(value, dict):
        schema = {
            "type": "object",
            "properties": {name: _schema_around(one, chance) for name, one in value.items()},
            "required": chance.sample(sorted(value), chance.randint(0, len(value))),
        }
    elif chance.random() < 0.5:
        schema = {"enum": [value, "a longer one"]}
    wrapped = chance.choice(["none", "anyOf", "allOf", "$ref"])
    if wrapped == "anyOf":
        return {"anyOf": [{"type": "string", "minLength": 9}, schema]}
    if wrapped == "allOf":
        return {"allOf": [schema, True]}
    return schema


@given(value=VALUES, chance=st.randoms(use_true_random=False))
def test_no_valid_json_is_shorter(value: Any, chance: Any) -> None:
    schema = _schema_around(value, chance)
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError:
        assume(False)
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert schema_extent(schema).shortest.size <= len(written)


@pytest.mark.parametrize(
    ("schema", "least", "where"),
    [
        ({"type": "string", "minLength": 10**9}, 10**9 + 2, "minLength at /minLength"),
        (
            {"type": "object", "properties": {"a/b": {"minItems": 9, "type": "array"}}, "required": ["a/b"]},
            27,
            "minItems at /properties/a~1b/minItems",
        ),
        ({"type": ["null", "string"], "minLength": 99}, 4, ""),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"const": "long text"}}}, 11, "const at /$defs/a/const"),
        ({"anyOf": [{"enum": ["abc", 1]}, {"const": [1, 2]}]}, 1, "enum at /anyOf/0/enum"),
        ({"$ref": "#"}, 1, ""),
        ({"type": "array", "minItems": 3, "prefixItems": [{"const": 10}], "items": {"const": 200}}, 12, None),
        ({}, 1, ""),
    ],
)  # fmt: skip
def test_the_shortest_json(schema: dict[str, Any], least: int, where: str | None) -> None:
    found = schema_extent(schema).shortest
    assert found.size == least
    if where is not None:
        assert found.where.removesuffix("") == where or found.size == 0


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "string", "pattern": "((a{99}){99}){999}"}, "pattern at /pattern"),
        (
            {"allOf": [{"pattern": f"[a-z]{{{i}}}x.{{{i}}}y"} for i in range(5, 40)]},
            "allOf at /allOf",
        ),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf at /multipleOf"),
        ({"type": "number", "multipleOf": 0.0100003}, "multipleOf at /multipleOf"),
    ],
)
def test_what_becomes_too_large(schema: dict[str, Any], where: str) -> None:
    found = schema_extent(schema).expanded
    assert found.size > MAX_SIZE and found.where == where


@pytest.mark.parametrize("value", [7, 1000, 0.01, 2.5, 1e9, 65536, 0, -3, "x", 86400])
def test_common_multiples_are_small(value: Any) -> None:
    assert schema_extent({"multipleOf": value}).expanded.size <= MAX_SIZE


def test_a_schema_that_repeats_itself_is_read_once() -> None:
    doubled = {
        f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "pattern": "ab"} for i in range(90)
    }
    found = schema_extent({"$defs": doubled, "$ref": "#/$defs/a0"})
    assert found.expanded.size > MAX_SIZE
