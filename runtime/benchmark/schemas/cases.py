"""The schemas of a file, and what each engine made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.models.arguments.paths import shown_path
from lowtide.models.arguments.text_files import decoded
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.verified.validator import Validator

MOST_SHOWN = 2000
"""Characters of a schema that its prompt shows."""


@dataclass(frozen=True, slots=True)
class SchemaCase:
    """A JSON schema, and the prompt that asks for an answer which follows it."""

    id: str
    schema: Any
    prompt: str


def read_cases(path: Path) -> list[SchemaCase]:
    """Return the schemas of a file of JSON lines with `schema`, and where the file has them `id` and `prompt`.

    Raises `BadOption` where the file has another format.
    """
    found = list[SchemaCase]()
    try:
        lines = decoded(path.read_bytes(), shown_path(path)).splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                entry = json.loads(line)
                schema = entry["schema"]
                schema = json.loads(schema) if isinstance(schema, str) else schema
                name, prompt = entry.get("id", number), entry.get("prompt", _prompt(schema))
                found.append(SchemaCase(str(name), schema, str(prompt)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadOption(
            f"cannot read schemas from {shown_path(path)} ({error!r}): write one JSON object per line, with "
            '"schema"'
        ) from error
    if not found:
        raise BadOption(f"{shown_path(path)} has no schemas: write one JSON object per line")
    return found


def _prompt(schema: Any) -> str:
    return f"Write JSON that follows this schema:\n{json.dumps(schema)[:MOST_SHOWN]}"


def is_valid(schema: Any, text: str) -> bool:
    """Whether a text is JSON that follows a schema; raises `BadOption` for a schema that cannot be checked."""
    return Validator(schema).violation(text.encode("utf-8", errors="replace")) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSummary:
    """What one engine made of the schemas; the terms are those of JSONSchemaBench (arXiv 2501.10868).

    `declared` is the share of schemas that it takes, `empirical` that of schemas whose answer follows them, and
    `compliance` the one divided by the other. Times are medians over the answers; `first_token_s` has the prompt and
    the work on the schema in it. `why_not` counts the reasons for which schemas were refused.
    """

    engine: str
    schemas: int
    declared: float
    empirical: float
    compliance: float | None
    first_token_s: float | None
    token_s: float | None
    why_not: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return asdict(self)


def summary_of(
    engine: str, cases: Sequence[SchemaCase], answers: Sequence[Mapping[str, Any]]
) -> EngineSummary:
    """Return the summary of the answers of one engine, one for each case."""
    taken = [
        (case, answer)
        for case, answer in zip(cases, answers, strict=True)
        if answer["refused"] is None
    ]
    num_valid = sum(is_valid(case.schema, answer["text"]) for case, answer in taken)
    reasons: dict[str, int] = {}
    for answer in answers:
        if answer["refused"] is not None:
            reasons[answer["refused"]] = reasons.get(answer["refused"], 0) + 1
    longer = [answer for _, answer in taken if answer["tokens"] > 1]
    return EngineSummary(
        engine=engine,
        schemas=len(cases),
        declared=len(taken) / len(cases),
        empirical=num_valid / len(cases),
        compliance=num_valid / len(taken) if taken else None,
        first_token_s=_median([answer["first_token_s"] for _, answer in taken]),
        token_s=_median([answer["seconds"] / (answer["tokens"] - 1) for answer in longer]),
        why_not=dict(sorted(reasons.items(), key=lambda item: -item[1])),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
