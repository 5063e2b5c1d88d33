"""Reading a JSON schema, and saying which keyword of it cannot be enforced, with its JSON pointer."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowtide.models.errors import BadOption

_NAMED = re.compile(r'"([$\w-]+)"|\'([$\w-]+)\'')
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose keys are names and not keywords."""
_VALUES = ("enum", "const")
"""Keywords whose value is one that an answer may have, or a list of those."""
_DATA = (*_VALUES, "default", "examples", "required")
"""Keywords whose value is no schema."""
_INSTEAD = {
    "oneOf": "use anyOf, or make the alternatives differ in a const",
    "uniqueItems": "leave it out and remove doubles afterwards",
    "not": "list what is allowed instead",
}


def parse_schema(source: str) -> Any:
    """Return the schema in a JSON text; raises `BadOption` where it is none."""
    try:
        schema = json.loads(source)
    except RecursionError:
        raise BadOption("the JSON schema is nested too deeply: flatten it") from None
    except ValueError as error:
        raise BadOption(f"the JSON schema is not JSON: {error}; correct it") from None
    if not isinstance(schema, (dict, bool)):
        raise BadOption(
            f"the JSON schema is a {type(schema).__name__}; it must be an object such as "
            '{"type": "object"}'
        )
    return schema


def refused_keyword(schema: Any, reason: str) -> str:
    """Return the sentence for a schema that llguidance refuses for `reason`, with keyword and JSON pointer."""
    keyword, pointer = _place(schema, reason)
    if keyword is None:
        return f"the JSON schema cannot be enforced: {reason}; leave that part out"
    instead = _INSTEAD.get(keyword, "leave it out or write it differently")
    return f"the JSON schema cannot be enforced: {keyword} at {pointer} ({reason}); {instead}"


def _place(schema: Any, reason: str) -> tuple[str | None, str]:
    """Return the keyword that a reason is about, and the JSON pointer of its first occurrence."""
    sites = [(pointer, keyword, value) for pointer, keyword, value in keywords_of(schema)]
    unknown_format = re.match(r"Unknown format: (.+)", reason)
    if unknown_format:
        for pointer, keyword, value in sites:
            if keyword == "format" and value == unknown_format[1].strip():
                return keyword, pointer
    named = [one for pair in _NAMED.findall(reason) for one in pair if one]
    named += re.findall(
        r"[$A-Za-z]+", reason.replace("min/maxProperties", "minProperties maxProperties")
    )
    for name in named:
        for pointer, keyword, _ in sites:
            if keyword == name and keyword not in ("properties", "required", "type"):
                return keyword, pointer
    return None, ""


def keywords_of(schema: Any, pointer: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield JSON pointer, keyword and value of every keyword of a schema and of those inside it."""
    waiting = deque([(schema, pointer)])
    while waiting:
        node, at = waiting.popleft()
        if isinstance(node, list):
            waiting += [(one, f"{at}/{i}") for i, one in enumerate(node)]
        if not isinstance(node, Mapping):
            continue
        for keyword, value in node.items():
            here = f"{at}/{escaped(keyword)}"
            yield here, keyword, value
            if keyword in _DATA:
                continue
            if keyword in _MAPS and isinstance(value, Mapping):
                waiting += [(one, f"{here}/{escaped(name)}") for name, one in value.items()]
            else:
                waiting.append((value, here))


def map_schemas(
    schema: Any, change: Callable[[dict[str, Any], str], dict[str, Any]], at: str = ""
) -> Any:
    """Return a schema where `change` was applied to each schema in it, the outer ones first.

    `change` takes a schema and its JSON pointer. Values of `const` and `enum` are no schemas and stay as they are;
    those of `default` and the like say nothing of answers, unless a `$ref` uses them as schemas.
    """
    if isinstance(schema, list):
        return [map_schemas(one, change, f"{at}/{i}") for i, one in enumerate(schema)]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for keyword, value in change(dict(schema), at).items():
        here = f"{at}/{escaped(keyword)}"
        if keyword in _VALUES:
            made[keyword] = value
        elif keyword in _MAPS and isinstance(value, Mapping):
            made[keyword] = {
                name: map_schemas(one, change, f"{here}/{escaped(name)}")
                for name, one in value.items()
            }
        else:
            made[keyword] = map_schemas(value, change, here)
    return made


def escaped(name: str) -> str:
    """Return a name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
