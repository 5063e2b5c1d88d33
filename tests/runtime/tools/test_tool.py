"""Tools from functions and from JSON."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypedDict

import pytest

from lowtide.models.errors import BadOption
from lowtide.runtime.tools.grammar import closed_schema
from lowtide.runtime.tools.tool import Tool, tools_of


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Warned:
    """A class without a JSON schema."""


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
    assert properties["days"] == {
        "type": "integer",
        "description": "how many days",
        "default": 1,
    }
    assert properties["unit"] == {
        "enum": ["celsius", "kelvin"],
        "description": "the unit of temperatures",
    }
    assert properties["place"]["description"] == "where to look"
    assert tool.parameters["$defs"]["Place"]["properties"] == {"city": {"type": "string"}}
    assert tool.parameters["required"] == ["place"]


def anything(*values: int) -> None: ...


def unreadable(value: Warned) -> None: ...


def by_position(value: int, /) -> None: ...


async def later() -> None: ...


WRONG: list[tuple[Any, str]] = [
    (5, "must be a function"),
    ({"type": "retrieval"}, "functions alone"),
    ({"function": {"name": ""}}, "has the name ''"),
    ({"function": {"name": "f", "parameters": {"type": "string"}}}, "schema of an object"),
    ({"function": {"name": "f", "parameters": {"x": {1, 2}}}}, "no JSON"),
    ({"function": {"name": "f", "parameters": {"enum": ["x" * 70_000]}}}, "shorten"),
    (anything, r"takes \*values"),
    (unreadable, "the parameter value of the function unreadable"),
    (by_position, "take the / out"),
    (later, "is a coroutine"),
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


@dataclass
class Box:
    width: int
    height: int = 2


def measure(box: Box, label: str | None = None, unit: Unit = Unit.KELVIN, times: int = 1) -> Any:
    """Measure a box."""
    if box.width < 0:
        raise ValueError("a width is at least 0")
    return label or {"area": box.width * box.height * times, "unit": unit.value}


def test_a_call_gets_values_of_the_annotated_types() -> None:
    tool = Tool.of(measure)
    assert tool.call('{"box": {"width": 3}}') == '{"area": 6, "unit": "kelvin"}'
    assert tool.call('{"box": {"width": 1}, "label": "small"}') == "small"
    assert '"unit": "celsius"' in tool.call('{"box": {"width": 1}, "unit": "celsius"}')


def test_what_goes_wrong_in_a_call_is_a_sentence_for_the_model() -> None:
    tool = Tool.of(measure)
    failed = tool.call('{"box": {"width": -1}}')
    assert failed == "Error: measure failed: ValueError: a width is at least 0"
    assert tool.call("{").startswith("Error: the arguments of measure cannot be read")
    assert tool.call('{"box": 5}').startswith("Error: the arguments of measure cannot be read")
    assert "missing" in tool.call("{}")


def test_a_class_of_pydantic_is_a_parameter_and_a_result() -> None:
    pydantic = pytest.importorskip("pydantic")
    point = pydantic.create_model("Point", x=(int, pydantic.Field(ge=0)), y=(int, 0))

    def move(at):  # type: ignore[no-untyped-def]
        return at.model_copy(update={"x": at.x + 1})

    move.__annotations__ = {"at": point}
    tool = Tool.of(move)
    assert tool.parameters["properties"]["at"]["properties"]["x"]["minimum"] == 0
    assert tool.call('{"at": {"x": 1}}') == '{"x":2,"y":0}'
    assert tool.call('{"at": {"x": -1}}').startswith("Error: the arguments of move")
