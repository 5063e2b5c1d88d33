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
from lowtide.attention.bindings.legal_tokens import best_legal
from lowtide.models.catalog import resolve
from lowtide.runtime.structured.answer import ConstrainedAnswer
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.vocabulary import TokenVocabulary

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


@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
def test_cost_of_a_token(model: str) -> None:
    """What a constraint takes for each token of known texts, far from the last tokens and among them."""
    with Runtime.open(resolve(model), memory="2GiB", context=1024, structured=True) as runtime:
        vocabulary = runtime._engine._vocabulary
        speed = runtime.generate("Once", temperature=0, max_tokens=64).stats.decode_tokens_per_s
        assert speed
        for style in ("pretty", "flexible"):
            for max_tokens in (1024, 110):
                spent = [
                    _seconds_of_tokens(vocabulary, fields, style, max_tokens)
                    for _, fields in TASKS * 5
                ]
                mean = sum(map(sum, spent)) / sum(map(len, spent))
                print(
                    f"\n{model}, {style}, at most {max_tokens} tokens: {mean * 1e6:.0f} us a token, "
                    f"{mean * speed:.1%} of decoding"
                )


def _seconds_of_tokens(
    vocabulary: TokenVocabulary, fields: dict[str, str], style: str, max_tokens: int
) -> list[float]:
    """Return the seconds for each token of an answer; those before the first token are not among them."""
    values = {"string": "a few words of it", "integer": 1234, "number": 3.25, "boolean": True}
    written = json.dumps({name: values[kind] for name, kind in fields.items()})
    form, spent, num_forced = JsonSchema(schema_of(fields), style), list[float](), 0
    answer = ConstrainedAnswer(form.compile(vocabulary), vocabulary.end_ids, max_tokens)
    for token_id in vocabulary.encode(written.encode()):
        started = time.perf_counter()
        is_forced = num_forced > 0
        assert (is_forced or answer.allows(token_id)) and answer.take(token_id)
        num_forced = num_forced - 1 if is_forced else len(answer.forced())
        spent.append(time.perf_counter() - started)
    return spent


@pytest.mark.parametrize("num_tokens", [49_152, 262_144])
def test_applying_a_mask(num_tokens: int) -> None:
    """The best legal token of a mask, natively and with numpy."""
    import numpy as np

    random = np.random.default_rng(0)
    logits = random.normal(0, 4, num_tokens).astype(np.float32)
    for share in (0.001, 0.5, 0.97):
        bits = random.random(num_tokens) < share
        mask = np.packbits(bits, bitorder="little").tobytes()

        def with_numpy(mask: bytes = mask) -> int:
            words = np.frombuffer(mask, np.uint8)
            legal = np.flatnonzero(np.unpackbits(words, count=num_tokens, bitorder="little"))
            return int(legal[logits[legal].argmax()])

        assert best_legal(logits, mask) == with_numpy()
        times = []
        for apply in (lambda mask=mask: best_legal(logits, mask), with_numpy):
            started = time.perf_counter()
            for _ in range(200):
                apply()
            times.append((time.perf_counter() - started) / 200 * 1e6)
        print(
            f"\n{num_tokens} tokens, {share:.1%} legal: {times[0]:.0f} us, numpy {times[1]:.0f} us"
        )
