"""`response_format`: OpenAI's forms, lowtide's formats, and `GenerationResult.parsed`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lowtide import (
    Choice,
    Constraint,
    GenerationResult,
    JsonObject,
    JsonSchema,
    Regex,
    Runtime,
    SamplingParams,
)
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.response_format import as_format

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (PERSON, JsonSchema(PERSON)),
        (
            {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
            JsonSchema(PERSON),
        ),
        (
            {"type": "json_schema", "name": "p", "strict": True, "schema": PERSON},
            JsonSchema(PERSON),
        ),
        ({"type": "json_object", "schema": PERSON}, JsonSchema(PERSON)),
        ({"type": "json_object"}, JsonObject()),
        ({"type": "text"}, None),
        (re.compile("a+"), Regex("a+")),
        (["a", "b"], Choice("a", "b")),
        ({"type": "string"}, JsonSchema({"type": "string"})),
    ],
)
def test_what_a_value_stands_for(value: Any, expected: Any) -> None:
    assert as_format(value) == expected
    assert SamplingParams.of(response_format=value).constraint == expected


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "p"}},
        {"type": "json_schema", "json_schema": "p"},
        {"type": "json_object", "schema": 3},
        {"type": "json"},
        3,
        "json",
    ],
)
def test_other_values_are_refused(value: Any, fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime()
    with pytest.raises(BadOption):
        runtime.generate("Q\n", response_format=value)
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


def test_two_names_are_one_too_many() -> None:
    with pytest.raises(BadOption, match="say the same"):
        SamplingParams.of(response_format=PERSON, constraint=PERSON)


def test_a_finished_answer_is_parsed(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime('{"name": "Ada"}')
    result = runtime.generate("Q\n", temperature=0, response_format=PERSON)
    assert (result.parsed, result.not_parsed_reason) == ({"name": "Ada"}, None)
    result = runtime.generate("Q\n", temperature=0, response_format={"type": "text"})
    assert (result.parsed, result.not_parsed_reason) == (None, "no response_format was asked for")
    formats = [PERSON, Choice("yes", "no")]
    params = [SamplingParams(temperature=0, max_tokens=40, constraint=one) for one in formats]
    batch = runtime.generate_batch(["Q\n", "Q\n"], params)
    assert batch[0].parsed == {"name": "Ada"} and batch[1].parsed in ("yes", "no")


def test_chats_are_parsed_with_the_same_format(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime('{"name": "Ada"}')
    chunks = runtime.chat("Who?", temperature=0, response_format=PERSON)
    assert GenerationResult.of(chunks, PERSON).parsed == {"name": "Ada"}


class Endless(Constraint):
    """Letters that may end at once, or never any more."""

    def __init__(self, text: bytes = b"") -> None:
        self._text = text

    def allows(self, token_id: int) -> bool:
        return token_id in b"ab"

    def legal_ids(self) -> Any:
        return np.array(list(b"ab"), np.int32)

    def advance(self, token_id: int) -> None:
        self._text += bytes([token_id])

    def fork(self) -> Endless:
        return Endless(self._text)

    @property
    def is_accepting(self) -> bool:
        return not self._text


def test_an_unfinished_answer_says_why_it_is_not_parsed(
    fake_runtime: Callable[..., Runtime],
) -> None:
    runtime = fake_runtime("ab" * 200)
    result = runtime.generate("Q\n", temperature=0, max_tokens=300, response_format=Endless())
    assert result.parsed is None
    assert str(result.not_parsed_reason).startswith("the answer is not complete")
