"""Bounds of numbers are those that are stated, or refused before the grammar library sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.extent.bounds import check_bounds
from lowtide.runtime.structured.extent.grammar_extent import grammar_extent
from lowtide.runtime.structured.extent.schema_extent import schema_extent

WORD = 1 << 63
ENDLESS = {"type": "integer", "minimum": -WORD, "maximum": -WORD + 1}
"""llguidance's search for a pattern of these integers ends the process."""


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": -WORD},
        {"minimum": -WORD + 1},
        {"maximum": -WORD - 9},
        {"exclusiveMaximum": -1e19},
        {"exclusiveMinimum": -1e19},
        {"minimum": WORD, "maximum": WORD + 5},
        {"exclusiveMinimum": 1e19},
        {"minimum": 2**53 + 1},
        {"maximum": WORD - 2},
        {"minimum": 10**400},
        {"maximum": float("inf")},
    ],
)
def test_bounds_that_would_change_are_refused_by_name(bounds: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"{next(iter(bounds))} at /properties/a/"):
        schema_extent({"properties": {"a": {"type": "integer", **bounds}}})


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": -(2**53), "maximum": 2**53},
        {"maximum": WORD - 1},
        {"maximum": 10**30},
        {"minimum": 0.1, "maximum": 0.3},
        {"minimum": -0.5},
        {"exclusiveMinimum": True, "minimum": "5"},
        {"minimum": 5 * 10**18},
    ],
)
def test_bounds_that_stay_or_become_narrower(bounds: dict[str, Any]) -> None:
    check_bounds({"type": "number", **bounds})


def test_names_of_properties_are_no_bounds() -> None:
    check_bounds({"properties": {"minimum": {"type": "integer", "maximum": 9}}})


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "integer", "minimum": -WORD}, {"maximum": -WORD + 1}]},
        {"$defs": {"minimum": ENDLESS}, "$ref": "#/$defs/minimum"},
        {"default": ENDLESS, "$ref": "#/default"},
        {"examples": [ENDLESS], "$ref": "#/examples/0"},
        {"any": {"name": ENDLESS}, "$ref": "#/any/name"},
    ],
)
def test_wherever_a_reference_may_point(schema: Any) -> None:
    with pytest.raises(BadOption, match="64 bits"):
        schema_extent(schema)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: %json {}",
        "start[lazy]: %json\n\n  {}",
        'start: "a" // %json\n  %json{}',
        'start: %lark {\nstart: "a"\n} b\nb: %json {}',
        "start: " + "(" * 1500 + "%json {}" + ")" * 1500,
    ],
)
def test_schemas_inside_grammars_also_where_the_rules_are_not_read(grammar: str) -> None:
    assert grammar_extent(grammar) is not None
    with pytest.raises(BadOption, match="64 bits"):
        grammar_extent(grammar.replace("{}", json.dumps(ENDLESS)))
