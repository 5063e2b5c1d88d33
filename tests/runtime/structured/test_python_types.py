"""Types of Python as formats: every answer becomes a value of the type, and what is no type of JSON is refused."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NewType, NotRequired, TypedDict

import jsonschema
import pytest

from lowtide import JsonSchema, Runtime
from lowtide.models.errors import BadOption
from lowtide.runtime.structured import formats
from lowtide.runtime.structured.python_types import NotReadable, PythonType


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


@dataclasses.dataclass
class Tree:
    name: str
    leaves: list[Tree] = dataclasses.field(default_factory=list)
    at: Point | None = None


class Visit(TypedDict):
    who: Name
    days: NotRequired[tuple[int, int]]
    mood: Literal["good", 1, None]


Name = NewType("Name", str)


@pytest.mark.parametrize(
    ("of", "valid", "value", "invalid"),
    [
        (Point, {"x": 3, "y": 2}, Point(3, 2.0), {"y": 1.0}),
        (Point, {"x": 3}, Point(3), {"x": 1, "z": 2}),
        (
            Tree,
            {"name": "a", "leaves": [{"name": "b", "at": {"x": 1}}]},
            Tree("a", [Tree("b", at=Point(1))]),
            {"name": "a", "leaves": [{}]},
        ),
        (Visit, {"who": "Ada", "mood": 1}, {"who": "Ada", "mood": 1}, {"who": "Ada", "mood": 2}),
        (
            Visit,
            {"who": "A", "mood": None, "days": [1, 2]},
            {"who": "A", "mood": None, "days": (1, 2)},
            {"who": "A", "mood": None, "days": [1]},
        ),
        (Colour, 1, Colour.ONE, "blue"),
        (list[Colour], ["red", 1], [Colour.RED, Colour.ONE], ["red", 2]),
        (dict[str, Point], {"a": {"x": 1}}, {"a": Point(1)}, {"a": {}}),
        (tuple[str, ...], ["a", "b"], ("a", "b"), [1]),
        (int | list[bool], [True], [True], ["a"]),
        (Point | dict[str, int], {"y": 1}, {"y": 1}, {"y": "a"}),
    ],
)
def test_values_of_a_type(of: Any, valid: Any, value: Any, invalid: Any) -> None:
    read = PythonType(of)
    jsonschema.validate(valid, read.schema)
    assert read.value(valid) == value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(invalid, read.schema)


@pytest.mark.parametrize("of", [set[int], dict[int, str], bytes, Literal[Colour.RED], Callable])
def test_types_without_a_schema(of: Any) -> None:
    with pytest.raises(NotReadable):
        PythonType(of)


def test_a_type_that_nobody_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda _name: None)
    with pytest.raises(BadOption, match="bytes has no JSON schema .*: install pydantic, or pass a"):
        JsonSchema(bytes)


def test_an_answer_becomes_an_object(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime('{"x": 3, "y": 2}')
    result = runtime.generate("Q\n", temperature=0, max_tokens=60, response_format=Point)
    assert result.parsed == Point(3, 2.0) and result.not_parsed_reason is None


def test_what_a_class_refuses_has_a_reason(fake_runtime: Callable[..., Runtime]) -> None:
    @dataclasses.dataclass
    class Even:
        x: int

        def __post_init__(self) -> None:
            if self.x % 2:
                raise ValueError("x is odd")

    runtime = fake_runtime('{"x": 3}')
    result = runtime.generate("Q\n", temperature=0, max_tokens=60, response_format=Even)
    assert result.parsed is None
    assert result.not_parsed_reason == "the type of the answer refuses it (ValueError: x is odd)"


@pytest.mark.skipif(importlib.util.find_spec("pydantic") is None, reason="pydantic is missing")
def test_a_pydantic_model(fake_runtime: Callable[..., Runtime]) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int = pydantic.Field(ge=0)

    runtime = fake_runtime('{"name": "Ada", "age": 36}')
    result = runtime.generate("Q\n", temperature=0, max_tokens=60, response_format=Person)
    assert result.parsed == Person(name="Ada", age=36)
