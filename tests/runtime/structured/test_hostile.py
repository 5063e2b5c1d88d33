"""Hostile schemas and grammars: refused in a sentence before anything is built, or built inside what is reserved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from lowtide import Grammar, JsonSchema, Regex, Runtime
from lowtide.memory.plan.line import STRUCTURED
from lowtide.memory.units import MIB, OverBudget
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.grammar.llguidance_constraint import GrammarTokenizer

TOO_LARGE: dict[str, Callable[[], Any]] = {
    "nested counts": lambda: Regex("(((a{99}){99}){99}){99}"),
    "in a schema": lambda: JsonSchema({"type": "string", "pattern": "(((a{99}){99}){99}){99}"}),
    "intersected": lambda: JsonSchema(
        {"allOf": [{"type": "string", "pattern": f"[a-z]{{{i}}}x.{{{i}}}y"} for i in range(5, 40)]}
    ),
    "remainders": lambda: JsonSchema({"type": "integer", "multipleOf": 1_000_003}),
    "in Lark": lambda: Grammar('start: A\nA: B{1000}\nB: C{1000}\nC: "x"{1000}'),
    "in GBNF": lambda: Grammar('root ::= a\na ::= "x"{1000000000}'),
    "bounds": lambda: JsonSchema({"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 1}),
    "at the end": lambda: JsonSchema(
        {"not": {}, "type": "string", "pattern": "(a{999}){9999}"}, check="verified"
    ),
}
TOO_LONG: dict[str, tuple[Callable[[], Any], str]] = {
    "minLength": (lambda: JsonSchema({"minLength": 10**9, "type": "string"}), "minLength at /minL"),
    "minItems": (lambda: JsonSchema({"type": "array", "minItems": 10**9}), "minItems at /minItems"),
    "rules": (
        lambda: Grammar(
            "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "x"'
        ),
        "the rule start asks for",
    ),
    "pattern": (lambda: Regex("a{900000}"), "the pattern asks for 900,000 characters"),
    "itself": (
        lambda: JsonSchema(
            {
                "$ref": "#/$defs/a",
                "$defs": {
                    "a": {
                        "type": "object",
                        "properties": {"x": {"$ref": "#/$defs/a"}},
                        "required": ["x"],
                    }
                },
            }
        ),
        "no answer was found",
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_not_built(
    name: str, fake_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fake_runtime()

    def built(*_arguments: Any) -> None:
        pytest.fail("the library was asked")

    monkeypatch.setattr(GrammarTokenizer, "matcher", built)
    with pytest.raises(BadOption, match="is expanded to about|asks for|numbers of 64 bits"):
        runtime.generate("Q\n", response_format=TOO_LARGE[name]())
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TOO_LONG)
@pytest.mark.parametrize("max_tokens", [64, None])
def test_what_cannot_be_closed_is_refused(
    name: str, max_tokens: int | None, fake_runtime: Callable[..., Runtime]
) -> None:
    runtime = fake_runtime()
    make, why = TOO_LONG[name]
    with pytest.raises(BadOption, match="cannot be completed") as refused:
        runtime.generate("Q\n", response_format=make(), max_tokens=max_tokens)
    assert why in str(refused.value) and "\n" not in str(refused.value)
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


LARGE: dict[str, Callable[[], Any]] = {
    "properties": lambda: JsonSchema(
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}
    ),
    "values": lambda: JsonSchema({"enum": [f"v{i}" for i in range(12_000)]}),
    "rules": lambda: Grammar(
        "start: "
        + " | ".join(f"r{i}" for i in range(4000))
        + "\n"
        + "".join(f'r{i}: "x{i}"\n' for i in range(4000))
    ),
    "combinations": lambda: JsonSchema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(4)]}
                for i in range(4)
            ]
        }
    ),
    "objects": lambda: JsonSchema(
        {
            "type": "object",
            "properties": {
                f"p{i}": {
                    "type": "object",
                    "properties": {f"q{j}": {"type": "integer"} for j in range(25)},
                }
                for i in range(150)
            },
        }
    ),
}
_MEASURE = """
import sys
sys.path.insert(0, {folder!r})
import numpy
from test_hostile import LARGE
from lowtide import JsonObject
from lowtide.memory.process import read_process_memory
from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
from lowtide.runtime.structured.vocabulary import TokenVocabulary
vocabulary = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)
JsonObject().compile(vocabulary).closing(9)
made = LARGE[{name!r}]()
before = read_process_memory().resident_bytes
made.compile(vocabulary).closing(99)
print(read_process_memory().peak_bytes - before, made.grammar_bytes)
"""


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_takes_no_more_than_is_reserved(name: str) -> None:
    from pathlib import Path

    program = _MEASURE.format(folder=str(Path(__file__).parent), name=name)
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    grown, estimated = map(int, found.stdout.split())
    assert grown <= max(estimated, 10 * MIB)


def test_a_large_grammar_has_room_of_its_own(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime("1")
    runtime.generate("Q\n", response_format=JsonSchema({"type": "integer"}), max_tokens=8)
    common = runtime.ledger.components[STRUCTURED]
    large = LARGE["properties"]()
    runtime.generate("Q\n", response_format=large, max_tokens=8)
    assert runtime.ledger.components[STRUCTURED] - common == large.grammar_bytes - 10 * MIB > 0
    runtime.ledger.reserve(STRUCTURED, common)
    room = runtime.ledger.budget_bytes - runtime.ledger.reserved_bytes
    runtime.ledger.reserve("other", room - MIB)
    with pytest.raises(OverBudget, match="structured output"):
        runtime.generate("Q\n", response_format=large, max_tokens=8)
