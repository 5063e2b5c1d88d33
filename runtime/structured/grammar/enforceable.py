"""A JSON schema as llguidance must read it, so that it accepts what the schema says.

Beside the bounds of numbers (see `bounds`), it differs in two places. It takes the 29th of February in every year, and
the year 0, which validators refuse. And it applies keywords beside `$ref`, which are remarks up to draft 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.extent.bounds import with_kept_bounds
from lowtide.runtime.structured.schema import escaped, keywords_of, map_schemas

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_BY_4 = "(?:0[48]|[2468][048]|[13579][26])"
REAL_DATE = (
    f"^(?:{_YEAR}-(?:(?:0[13-9]|1[0-2])-|02-[01]|02-2[0-8])|(?:[0-9]{{2}}{_BY_4}|{_BY_4}00)-02-29)"
)
"""What a date of the proleptic Gregorian calendar begins with, where months have no more days than a `date` has."""
_DATES = ("date", "date-time")
_OLD_DRAFTS = ("/draft-03/", "/draft-04/", "/draft-06/", "/draft-07/")
_NO_REMARKS = ("$ref", "$schema", "$id", "id", "definitions", "$defs")


def enforceable(schema: Any) -> Any:
    """Return a schema that llguidance reads as `schema` is meant; raises `BadOption` where it is nested too deeply."""
    try:
        return with_kept_bounds(_with_real_dates(_without_remarks(schema)))
    except RecursionError:
        raise BadOption("the JSON schema is nested too deeply: flatten it") from None


def _without_remarks(schema: Any) -> Any:
    """Return the schema without keywords beside `$ref`, where its draft ignores them and no `$ref` leads into them."""
    dialect = schema.get("$schema") if isinstance(schema, Mapping) else None
    if not isinstance(dialect, str) or not any(draft in dialect for draft in _OLD_DRAFTS):
        return schema
    targets = {
        f"{value[1:]}/"
        for _, keyword, value in keywords_of(schema)
        if keyword == "$ref" and isinstance(value, str) and value.startswith("#")
    }

    def is_remark(keyword: str, pointer: str) -> bool:
        return keyword not in _NO_REMARKS and not any(
            target.startswith(f"{pointer}/") for target in targets
        )

    def change(node: dict[str, Any], at: str) -> dict[str, Any]:
        if not isinstance(node.get("$ref"), str):
            return node
        return {k: v for k, v in node.items() if not is_remark(k, f"{at}/{escaped(k)}")}

    return map_schemas(schema, change)


def _with_real_dates(schema: Any) -> Any:
    def change(node: dict[str, Any], _at: str) -> dict[str, Any]:
        if node.get("format") not in _DATES:
            return node
        if "pattern" not in node:
            return {**node, "pattern": REAL_DATE}
        others = node.get("allOf", [])
        return (
            {**node, "allOf": [*others, {"pattern": REAL_DATE}]}
            if isinstance(others, list)
            else node
        )

    return map_schemas(schema, change)
