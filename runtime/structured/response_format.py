"""What callers pass as the format of an answer: Python types, OpenAI's `response_format`, and lowtide's own formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_origin

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import (
    Choice,
    JsonObject,
    JsonSchema,
    OutputFormat,
    OwnConstraint,
    Regex,
)

OPENAI_TYPES = ("json_schema", "json_object", "text")
"""The types of OpenAI's `response_format`; none of them is a type of JSON Schema, so the two cannot be confused."""


def as_format(value: Any) -> OutputFormat | None:
    """Return the value as a format, None for any text; raises `BadOption` for what is none.

    A dict is a JSON schema or OpenAI's `response_format`, a type of Python a JSON schema, a compiled `re` pattern a
    regular expression, and a list of texts are choices.
    """
    if isinstance(value, OutputFormat):
        return value
    if isinstance(value, Constraint):
        return OwnConstraint(value)
    if isinstance(value, re.Pattern):
        return Regex(value)
    if isinstance(value, list | tuple | set | frozenset):
        return Choice(value)
    if isinstance(value, Mapping):
        return _openai(value) if value.get("type") in OPENAI_TYPES else JsonSchema(value)
    if isinstance(value, type) or get_origin(value) is not None:
        return JsonSchema(value)
    raise BadOption(
        f"it is {shown(value)}; it must be JsonSchema(...), JsonObject(), Regex(...), Grammar(...), Choice(...), a "
        "dict with a JSON schema, a dataclass, or a pydantic model"
    )


def _openai(value: Mapping[str, Any]) -> OutputFormat | None:
    """Read `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}` and its shorter forms."""
    kind = value["type"]
    if kind == "text":
        return None
    inside = value.get("json_schema", value)
    schema = inside.get("schema") if isinstance(inside, Mapping) else None
    if kind == "json_object" and schema is None:
        return JsonObject()
    if not isinstance(schema, Mapping | bool):
        raise BadOption(
            f'a response_format of type {kind!r} has the schema {shown(schema)}; pass {{"type": "json_schema", '
            '"json_schema": {"name": "answer", "schema": {"type": "object"}}}'
        )
    return JsonSchema(schema)
