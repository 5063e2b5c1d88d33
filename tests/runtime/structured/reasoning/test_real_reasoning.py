"""Reasoning before an answer, with the default model: the form holds, and what ends it does not change the answer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from lowtide import AllOf, Avoid, Choice, JsonSchema, ReasonFirst, Regex, Runtime

SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 30}, "trees": {"type": "integer"}},
    "required": ["town", "trees"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Lund planted 3 rows of 14 trees. Which town, how many?"}]


@pytest.mark.parametrize("temperature", [0, 1.2])
@pytest.mark.parametrize("most", [1, 24])
def test_the_answer_follows_its_schema(
    real_runtime: Runtime, most: int, temperature: float
) -> None:
    form = ReasonFirst(JsonSchema(SCHEMA), most)
    chunks = list(
        real_runtime.chat(
            MESSAGES, constraint=form, max_tokens=120, temperature=temperature, seed=3
        )
    )
    text = "".join(chunk.text for chunk in chunks)
    reasoning, _, answer = text.partition("Answer:\n")
    jsonschema.validate(json.loads(answer), SCHEMA)
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].stats.structured is not None
    assert 0 < chunks[-1].stats.structured["reasoning_tokens"] <= most + 8
    assert "{" not in reasoning or most > 1


@pytest.mark.parametrize(
    "form", [Choice("few", "many"), Regex("[0-9]{1,4}"), AllOf(Regex("[a-z ]{3,20}"), Avoid("the"))]
)
def test_forced_markers_and_drafts_do_not_change_it(
    real_runtime: Runtime, smollm2: object, form: Any
) -> None:
    asked: dict[str, Any] = {
        "response_format": ReasonFirst(form, 20),
        "temperature": 0,
        "max_tokens": 70,
    }
    plain = real_runtime.generate("Here is how I count 3 rows of 14 trees. First,", **asked)
    again = real_runtime.generate(
        "Here is how I count 3 rows of 14 trees. First,", logprobs=1, **asked
    )
    with Runtime.open(
        smollm2,  # type: ignore[arg-type]
        memory="8GiB",
        context=2048,
        speculate="ngram",
    ) as runtime:
        drafted = runtime.generate("Here is how I count 3 rows of 14 trees. First,", **asked)
    assert plain.text == again.text == drafted.text
    assert plain.answer and plain.answer in plain.text and plain.reasoning
    assert plain.reasoning not in plain.answer
