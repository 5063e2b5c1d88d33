"""How much memory the grammar library takes to build what a schema or a grammar says: estimates from above.

The bytes of each thing are those of the library's version 1.9, measured with schemas of thousands of the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.runtime.structured.extent.extent import CAP
from lowtide.runtime.structured.schema import keywords_of

PROPERTY_BYTES = 12 * 1024
VALUE_BYTES, VALUE_CHARACTER_BYTES = 640, 100
"""A value of an `enum`, and each character of it."""
TEXT_BYTES, RULE_BYTES = 3600, 1024
"""A text in a grammar, and a rule or an alternative of a schema."""
STATE_BYTES = 6
"""A unit of the expanded size: an automaton of the largest size takes some megabytes."""
_CHOICES = ("anyOf", "oneOf")


def schema_bytes(schema: Any, expanded: int) -> int:
    """Return the bytes for a JSON schema whose automata have the size `expanded`."""
    num_bytes = min(expanded, CAP) * STATE_BYTES
    for _, keyword, value in keywords_of(schema):
        if keyword == "properties" and isinstance(value, Mapping):
            num_bytes += len(value) * PROPERTY_BYTES
        elif keyword == "enum" and isinstance(value, list):
            num_bytes += sum(values_bytes(str(one)) for one in value)
        elif keyword == "allOf" and isinstance(value, list):
            combined, inside = _combinations({keyword: value}, 0), _num_properties(value)
            num_bytes += (combined - 1) * max(inside, 1) * PROPERTY_BYTES
        elif keyword in _CHOICES and isinstance(value, list):
            num_bytes += len(value) * RULE_BYTES
    return min(num_bytes, CAP)


def values_bytes(*values: str) -> int:
    """Return the bytes for values of which one may come."""
    return sum(VALUE_BYTES + VALUE_CHARACTER_BYTES * len(value) for value in values)


def _combinations(node: Any, depth: int) -> int:
    """Return how many alternatives a schema has when those of `allOf` are combined with each other."""
    if not isinstance(node, Mapping) or depth > 8:
        return 1
    count = 1
    parts = node.get("allOf")
    for part in parts if isinstance(parts, list) else ():
        count = min(count * _combinations(part, depth + 1), CAP)
    for keyword in _CHOICES:
        options = node.get(keyword)
        if isinstance(options, list) and options:
            found = sum(_combinations(one, depth + 1) for one in options)
            count = min(count * found, CAP)
    return count


def _num_properties(value: Any) -> int:
    return sum(
        len(found)
        for _, keyword, found in keywords_of(value)
        if keyword == "properties" and isinstance(found, Mapping)
    )
