"""Structured output: passes that forced text saves, and what a constraint costs a token.

Run with `make bench`, or with pytest -m benchmark -s tests/benchmarks/test_structured.py.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lowtide import GenerationResult, JsonSchema, Runtime
from lowtide.runtime.structured.answer import ConstrainedAnswer
from lowtide.runtime.structured.constraint import Constraint

pytestmark = pytest.mark.benchmark
TASKS: list[tuple[str, dict[str, Any]]] = [
    (
        "Maria Keller, a 42-year-old botanist from Graz, keeps bees.",
        {"name": "string", "age": "integer", "profession": "string", "city": "string"},
    ),
    (
        "Order 7731: three oak chairs at 85.50 euros each, to be delivered on Friday.",
        {"order_number": "integer", "article": "string", "quantity": "integer", "price": "number"},
    ),
    (
        "The ferry Aurora leaves Bergen at 18:30 from pier 4 and is not delayed.",
        {"ship": "string", "departure_harbour": "string", "pier": "integer", "delayed": "boolean"},
    ),
    (
        "Boil 250 grams of lentils for 25 minutes, then add salt. It feeds four.",
        {"ingredient": "string", "grams": "integer", "minutes": "integer", "portions": "integer"},
    ),
    (
        "Patient reports a mild headache since Monday; temperature 37.2, no allergies.",
        {
            "symptom": "string",
            "severity": "string",
            "temperature_celsius": "number",
            "has_allergies": "boolean",
        },
    ),
    (
        "On 3 May the river Mur rose to 4.1 metres; two bridges were closed.",
        {"river": "string", "date": "string", "level_metres": "number", "closed_bridges": "integer"},
    ),
]  # fmt: skip
PROMPT = "Text: {}\nThe same as JSON:\n"


def schema_of(fields: dict[str, str]) -> dict[str, Any]:
    """Return the schema of an object with fields of these types; texts have at most 40 characters."""
    return {
        "type": "object",
        "properties": {
            name: {"type": kind, "maxLength": 40} if kind == "string" else {"type": kind}
            for name, kind in fields.items()
        },
        "required": list(fields),
        "additionalProperties": False,
    }


class TokenByToken(Constraint):
    """The same answers with a pass for every token."""

    def __init__(self, inner: Constraint, forced: tuple[int, ...] = ()) -> None:
        self._inner, self._forced = inner, forced

    def _next(self) -> int | None:
        if not self._forced:
            found = tuple(self._inner.forced())
            self._forced = found[: self._inner.num_legal(found)]
        return self._forced[0] if self._forced else None

    def allows(self, token_id: int) -> bool:
        forced = self._next()
        return self._inner.allows(token_id) if forced is None else token_id == forced

    def legal_ids(self) -> Any:
        import numpy as np

        forced = self._next()
        return self._inner.legal_ids() if forced is None else np.array([forced], np.int32)

    def advance(self, token_id: int) -> None:
        self._inner.advance(token_id)
        self._forced = self._forced[1:]

    def fork(self) -> TokenByToken:
        return TokenByToken(self._inner.fork(), self._forced)

    def closing(self, max_tokens: int) -> Any:
        return self._inner.closing(max_tokens)

    @property
    def is_accepting(self) -> bool:
        return self._inner.is_accepting


@pytest.mark.parametrize("style", ["pretty", "compact", "flexible"])
def test_passes_saved(smollm2: Path, style: str) -> None:
    with Runtime.open(smollm2, memory="2GiB", context=1024, structured=True) as runtime:
        vocabulary = runtime._engine._vocabulary
        passes, ratios, num_equal = [0, 0], [], 0

        def ask(prompt: str, asked: Any) -> tuple[GenerationResult, float]:
            started = time.perf_counter()
            result = runtime.generate(prompt, response_format=asked, temperature=0, max_tokens=120)
            return result, time.perf_counter() - started

        for text, fields in TASKS:
            form = JsonSchema(schema_of(fields), style)
            prompt = PROMPT.format(text)
            plain = TokenByToken(form.compile(vocabulary))
            ask(prompt, form)
            times: list[tuple[float, float]] = []
            for _ in range(3):
                (first, fast_s), (second, slow_s) = ask(prompt, form), ask(prompt, plain)
                times.append((fast_s, slow_s))
            jsonschema.validate(json.loads(first.text), schema_of(fields))
            num_equal += first.token_ids == second.token_ids
            assert first.structured is not None
            passes[0] += len(first.token_ids) - first.structured["passes_saved"]
            passes[1] += len(second.token_ids)
            ratios.append(statistics.median(slow / fast for fast, slow in times))
    saved = 1 - passes[0] / passes[1]
    print(
        f"\n{style}: {passes[0]} passes for {passes[1]} tokens ({saved:.0%} saved), end to end "
        f"{statistics.median(ratios):.2f} times as fast, {num_equal} of {len(TASKS)} texts equal"
    )
    assert num_equal == len(TASKS) or style == "flexible"


def test_cost_of_a_token(smollm2: Path) -> None:
    with Runtime.open(smollm2, memory="2GiB", context=1024, structured=True) as runtime:
        vocabulary = runtime._engine._vocabulary
        values = {"string": "a few words of it", "integer": 1234, "number": 3.25, "boolean": True}
        spent: list[float] = []
        for _, fields in TASKS * 5:
            answer_text = json.dumps({name: values[kind] for name, kind in fields.items()})
            token_ids = vocabulary.encode(answer_text.encode())
            answer = ConstrainedAnswer(
                JsonSchema(schema_of(fields)).compile(vocabulary), vocabulary.end_ids, 512
            )
            for token_id in token_ids:
                started = time.perf_counter()
                assert answer.allows(token_id) and answer.take(token_id)
                answer.forced()
                spent.append(time.perf_counter() - started)
        started = time.perf_counter()
        result = runtime.generate("Once", temperature=0, max_tokens=64)
        assert result.stats.decode_tokens_per_s
    microseconds = statistics.mean(spent) * 1e6
    share = statistics.mean(spent) * result.stats.decode_tokens_per_s
    print(f"\na constraint takes {microseconds:.0f} us a token, {share:.1%} of decoding")
