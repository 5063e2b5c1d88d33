"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from lowtide.cli.server.errors import ApiError, api_error
from lowtide.cli.server.reading.fields import Fields
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.structured.response_format import OPENAI_TYPES

SAMPLING = (
    "temperature top_p top_k min_p repeat_penalty repeat_last_n frequency_penalty presence_penalty logit_bias seed "
    "stop overflow"
).split()
"""Fields with the names of `SamplingParams`: those of OpenAI's API, and lowtide's own beside them."""


def take_sampling(
    fields: Fields, base: SamplingParams, *, length_fields: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the sampling parameters that the request states; the first of `length_fields` wins.

    Each is checked alone, so that an error names its field.
    """
    values: dict[str, Any] = {}
    for name in SAMPLING:
        value = fields.take(name)
        if value is not None:
            values[name] = _checked(name, value, fields.path(name), base)
    for name in reversed(length_fields):
        value = fields.take(name)
        if value is not None:
            values["max_tokens"] = _checked("max_tokens", value, fields.path(name), base)
    return values


def _checked(name: str, value: Any, path: str, base: SamplingParams) -> Any:
    try:
        return getattr(SamplingParams.of(base, **{name: value}), name)
    except BadOption as error:
        raise api_error(error, path) from None


def sampling_of(base: SamplingParams, values: dict[str, Any], format: Any = None) -> SamplingParams:
    """Return `base` with the values of a request and the format that its answer must have."""
    try:
        if format is not None:
            values = {**values, "response_format": format}
        return SamplingParams.of(base, **values)
    except BadOption as error:
        raise api_error(error, None if format is None else "response_format") from None


def take_format(fields: Fields, name: str = "response_format") -> Any:
    """Return the format of the answer in OpenAI's form; None for any text."""
    stated = fields.object(name)
    if stated is None:
        return None
    kind = stated.choice("type", OPENAI_TYPES)
    if kind is None:
        path = stated.path("type")
        raise ApiError(
            400, f"{path} is missing; it must be one of {', '.join(OPENAI_TYPES)}", param=path
        )
    schema = stated.take("schema")
    inside = stated.object("json_schema")
    if inside is not None:
        schema = inside.take("schema")
        inside.ignore("name", "description", "strict")
        inside.finish(["schema"])
    stated.ignore("name", "description", "strict")  # where the schema is not inside another object
    stated.finish(["json_schema"])
    if kind == "json_schema" and not isinstance(schema, dict | bool):
        path = fields.path(name) + ".json_schema.schema"
        raise ApiError(400, f"{path} is {shown(schema)}; it must be a JSON schema", param=path)
    return {"type": kind} if schema is None else {"type": kind, "schema": schema}
