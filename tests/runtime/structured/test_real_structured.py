"""Structured output of the default model: every answer follows its format, whole at any length."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from lowtide import Regex, Runtime
from lowtide.memory.plan.line import STRUCTURED
from lowtide.memory.process import read_process_memory

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "fields": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "born", "fields"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Describe Ada Lovelace, born in 1815, as JSON."}]


@pytest.mark.parametrize("max_tokens", [28, 64])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_the_schema(
    real_runtime: Runtime, max_tokens: int, temperature: float
) -> None:
    chunks = list(
        real_runtime.chat(
            MESSAGES, constraint=SCHEMA, max_tokens=max_tokens, temperature=temperature, seed=1
        )
    )
    assert sum(chunk.token_id is not None for chunk in chunks) <= max_tokens
    jsonschema.validate(json.loads("".join(chunk.text for chunk in chunks)), SCHEMA)


def test_a_regular_expression(real_runtime: Runtime) -> None:
    date = real_runtime.generate("The date is ", constraint=Regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"))
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.text)


def test_the_plan_covers_what_it_takes(smollm2: object) -> None:
    with Runtime.open(smollm2, memory="8GiB", context=512, structured=True) as runtime:  # type: ignore[arg-type]
        runtime.generate("Hello", max_tokens=4)
        before = read_process_memory().resident_bytes
        runtime.generate("Hello", constraint=SCHEMA, max_tokens=60, temperature=0)
        grown = read_process_memory().resident_bytes - before
        assert grown <= runtime.ledger.components[STRUCTURED]
