"""The benchmark of structured output: its file, its figures, and engines that are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide import Runtime
from lowtide.models.errors import BadOption
from lowtide.models.read_spec import read_spec
from lowtide.runtime.benchmark.schemas.benchmark import run_schemas
from lowtide.runtime.benchmark.schemas.cases import SchemaCase, read_cases, summary_of
from lowtide.runtime.benchmark.schemas.engines import (
    FREE,
    OURS,
    PEERS,
    PeerModel,
    Refused,
    engines_here,
)

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def answer(text: str, *, refused: str | None = None, tokens: int = 5) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "first_token_s": 0.5,
        "seconds": 2.0,
        "refused": refused,
    }


def test_a_file_of_schemas(tmp_path: Path) -> None:
    path = tmp_path / "schemas.jsonl"
    lines = [
        {"schema": SCHEMA},
        {"id": "b", "schema": json.dumps({"type": "null"}), "prompt": "Null?"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = read_cases(path)
    assert first.id == "1" and first.schema == SCHEMA and '"colour"' in first.prompt
    assert second == SchemaCase("b", {"type": "null"}, "Null?")


@pytest.mark.parametrize("text", ["", "{", '{"id": 3}', "[]", '{"schema": "{"}'])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schemas.jsonl"
    path.write_text(text)
    with pytest.raises(BadOption, match="one JSON object per line"):
        read_cases(path)
    with pytest.raises(BadOption, match="one JSON object per line"):
        read_cases(tmp_path / "missing.jsonl")


def test_coverage_and_compliance() -> None:
    cases = [SchemaCase(str(i), {"type": "integer"}, "?") for i in range(4)]
    answers = [
        answer("3"),
        answer("3.5"),
        answer("", refused="oneOf"),
        answer("not JSON", tokens=1),
    ]
    found = summary_of("some", cases, answers).to_dict()
    assert found["declared"] == 0.75 and found["empirical"] == 0.25
    assert found["compliance"] == pytest.approx(1 / 3)
    assert found["first_token_s"] == 0.5 and found["token_s"] == 0.5
    assert found["why_not"] == {"oneOf": 1}
    none = summary_of("none", cases[:1], [answer("", refused="all")])
    assert none.compliance is None and none.token_s is None


@pytest.mark.parametrize("name", [name for name in engines_here("llama.cpp") if name in PEERS])
def test_another_engine_follows_the_schema(real_runtime: Runtime, name: str) -> None:
    vocabulary = real_runtime._engine.vocabulary
    model = PeerModel(vocabulary, real_runtime._model.tokenizer.vocabulary)  # type: ignore[attr-defined]
    matcher = PEERS[name][1](SCHEMA, model)
    random, token_ids = np.random.default_rng(0), list[int]()
    try:
        for _ in range(200):
            logits = random.normal(0, 1, vocabulary.num_tokens).astype(np.float32)
            logits[list(vocabulary.end_ids)] += 20
            for byte in b'"}':
                logits[vocabulary.single_bytes[byte]] += 10
            chosen = matcher.choose(logits)
            if chosen is None or chosen in vocabulary.end_ids:
                break
            matcher.advance(chosen)
            token_ids.append(chosen)
    finally:
        matcher.close()
    assert set(json.loads(vocabulary.decode(token_ids))) == {"colour", "count"}


def test_what_llama_cpp_cannot_read_is_refused(real_runtime: Runtime) -> None:
    model = PeerModel(
        real_runtime._engine.vocabulary,
        real_runtime._model.tokenizer.vocabulary,  # type: ignore[attr-defined]
    )
    with pytest.raises(Refused):
        PEERS["llama.cpp"][1]({"$ref": "#/nowhere"}, model)


def test_each_engine_answers_in_a_process_of_its_own(smollm2: Path) -> None:
    cases = [
        SchemaCase("a", SCHEMA, "A colour and a count as JSON:"),
        SchemaCase("b", {"type": "string", "not": {"const": "x"}}, "A word as JSON:"),
    ]
    config = {"memory": 2 << 30, "context": 512, "structured": True}
    messages: list[str] = []
    engines = [FREE, OURS, "llama.cpp"]
    found = run_schemas(
        read_spec(smollm2),
        engines,
        cases,
        20,
        config,
        template_arguments={},
        enforced=False,
        progress=messages.append,
    )
    assert [one.engine for one in found] == engines and len(messages) == 2
    assert found[1].declared == 0.5 and found[1].compliance == 1
    assert next(iter(found[1].why_not)).startswith("not")
    assert found[0].declared == 1
    assert all(one.token_s and one.first_token_s for one in found)
