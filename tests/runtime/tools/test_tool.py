"""Tools from functions and from JSON."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, TypedDict

import pytest

from lowtide.models.errors import BadOption
from lowtide.runtime.tools.grammar import closed_schema
from lowtide.runtime.tools.tool import Tool, tools_of


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(TypedDict):
    city: str


def weather(
    place: Place, days: int = 1, unit: Unit = Unit.CELSIUS, kind: Literal["a", "b"] = "a"
) -> str:
    """Return the weather.

    Args:
        place: where to look
        days (int): how many days

    :param unit: the unit of temperatures
    """
    return "warm"


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    tool = Tool.of(weather)
    assert (tool.name, tool.description, tool.run) == ("weather", "Return the weather.", weather)
    properties = tool.parameters["properties"]
    assert properties["days"] == {"type": "integer", "description": "how many days"}
    assert properties["unit"] == {
        "enum": ["celsius", "kelvin"],
        "description": "the unit of temperatures",
    }
    assert properties["place"]["description"] == "where to look"
    assert tool.parameters["$defs"]["Place"]["properties"] == {"city": {"type": "string"}}
    assert tool.parameters["required"] == ["place"]


def anything(*values: int) -> None: ...


def unreadable(value: complex) -> None: ...


WRONG: list[tuple[Any, str]] = [
    (5, "must be a function"),
    ({"type": "retrieval"}, "functions alone"),
    ({"function": {"name": ""}}, "has the name ''"),
    ({"function": {"name": "f", "parameters": {"type": "string"}}}, "schema of an object"),
    ({"function": {"name": "f", "parameters": {"x": {1, 2}}}}, "no JSON"),
    ({"function": {"name": "f", "parameters": {"enum": ["x" * 70_000]}}}, "shorten"),
    (anything, r"takes \*values"),
    (unreadable, "complex"),
]


@pytest.mark.parametrize(("value", "text"), WRONG)
def test_what_cannot_be_a_tool_is_refused(value: Any, text: str) -> None:
    with pytest.raises(BadOption, match=text):
        Tool.of(value)


def test_names_are_unique() -> None:
    with pytest.raises(BadOption, match="two tools have the name weather"):
        tools_of([weather, weather])
    with pytest.raises(BadOption, match="must be a list"):
        tools_of("weather")
    with pytest.raises(BadOption, match="at most 128"):
        tools_of([{"function": {"name": f"f{i}"}} for i in range(129)])


def test_objects_are_closed_where_they_do_not_say_otherwise() -> None:
    schema = {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "properties": {"a": {"type": "string"}}},
            "open": {"type": "object", "properties": {}, "additionalProperties": True},
            "free": {"type": "object"},
            "one": {"allOf": [{}], "properties": {}},
        },
    }
    closed = closed_schema(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["properties"]["additionalProperties"] is False
    assert closed["properties"]["open"]["additionalProperties"] is True
    assert "additionalProperties" not in closed["properties"]["free"]
    assert "additionalProperties" not in closed["properties"]["one"]
