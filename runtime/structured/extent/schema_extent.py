"""The extent of a JSON schema: the shortest JSON that it allows, and the size of its patterns and numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import unquote

from lowtide.runtime.structured.extent.bounds import check_bounds
from lowtide.runtime.structured.extent.bytes import schema_bytes
from lowtide.runtime.structured.extent.extent import (
    CAP,
    DIGITS_SIZE,
    NOTHING,
    REMAINDER_SIZE,
    Extent,
    Part,
    intersection,
    largest,
    total,
)
from lowtide.runtime.structured.extent.pattern_extent import pattern_extent
from lowtide.runtime.structured.schema import escaped, keywords_of

MAX_DEPTH = 100
"""Schemas inside each other that are followed; what is deeper counts as nothing."""
FORMAT_SIZE = 60
"""Size of the pattern of a `format`."""
_KINDS = ("null", "boolean", "integer", "number", "string", "array", "object")
_PLAIN = {"null": Part(4), "boolean": Part(4), "integer": Part(1), "number": Part(1)}


def schema_extent(schema: Any) -> Extent:
    """Return the extent of a schema; raises `BadOption` for numbers whose bounds cannot be kept."""
    check_bounds(schema)
    expanded = _expanded(schema)
    num_bytes = schema_bytes(schema, expanded.size)
    return Extent(_Shortest(schema).of(schema, "", 0), expanded, num_bytes)


class _Shortest:
    """Finds the fewest characters of JSON that a schema allows; each schema inside it is looked at once."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, Part] = {}

    def of(self, node: Any, at: str, depth: int) -> Part:
        """Return the shortest value of the schema `node`, whose JSON pointer is `at`."""
        if node is True:
            return Part(1)
        if not isinstance(node, Mapping) or depth > MAX_DEPTH:
            return NOTHING
        if id(node) not in self._known:
            self._known[id(node)] = NOTHING  # inside itself, it adds nothing
            self._known[id(node)] = largest(*self._bounds(node, at, depth + 1))
        return self._known[id(node)]

    def _bounds(self, node: Mapping[str, Any], at: str, depth: int) -> Iterable[Part]:
        """Yield what each keyword asks for: the value has at least the largest of them."""
        if isinstance(node.get("$ref"), str):
            yield self.of(resolved(self._root, node["$ref"]), node["$ref"].lstrip("#"), depth)
        if "const" in node:
            yield Part(_length(node["const"]), f"const at {at}/const")
        if isinstance(node.get("enum"), list) and node["enum"]:
            yield Part(min(map(_length, node["enum"])), f"enum at {at}/enum")
        for keyword in ("allOf", "anyOf", "oneOf"):
            options = node.get(keyword)
            if isinstance(options, list) and options:
                found = [
                    self.of(one, f"{at}/{keyword}/{i}", depth) for i, one in enumerate(options)
                ]
                yield largest(*found) if keyword == "allOf" else min(found, key=_size)
        kinds = node.get("type", _KINDS)
        named = (
            [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list | tuple) else ()
        )
        found = [self._kind(str(kind), node, at, depth) for kind in named]
        if found:
            yield min(found, key=_size)

    def _kind(self, kind: str, node: Mapping[str, Any], at: str, depth: int) -> Part:
        if kind == "string":
            pattern = node.get("pattern")
            least = pattern_extent(pattern).least if isinstance(pattern, str) else 0
            return total(
                Part(2),
                largest(
                    Part(_count(node.get("minLength")), f"minLength at {at}/minLength"),
                    Part(least, f"pattern at {at}/pattern"),
                ),
            )
        if kind == "array":
            return self._array(node, at, depth)
        return self._object(node, at, depth) if kind == "object" else _PLAIN.get(kind, NOTHING)

    def _array(self, node: Mapping[str, Any], at: str, depth: int) -> Part:
        count = _count(node.get("minItems"))
        if not count:
            return Part(2)
        name = "items" if isinstance(node.get("items"), list) else "prefixItems"
        first = node.get(name)
        listed = first[:count] if isinstance(first, list) else []
        parts = [self.of(one, f"{at}/{name}/{i}", depth) for i, one in enumerate(listed)]
        rest = node.get("additionalItems" if name == "items" else "items", True)
        where = f"minItems at {at}/minItems"
        item = total(self.of(rest, f"{at}/items", depth), Part(1))
        return total(Part(2 + len(parts)), *parts, item.times(count - len(parts), where), Part(-1))

    def _object(self, node: Mapping[str, Any], at: str, depth: int) -> Part:
        properties = node.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = node.get("required")
        parts, where = list[Part](), f"required at {at}/required"
        for name in required if isinstance(required, list) else ():
            value = self.of(
                properties.get(name, True), f"{at}/properties/{escaped(str(name))}", depth
            )
            key = _length(name) + 2  # with its colon, and a comma or brace
            parts.append(Part(value.size + key, value.where if value.size > key else where))
        return total(Part(1), *parts, Part(0 if parts else 1))


def _expanded(schema: Any) -> Part:
    """Return the largest automaton that the schema needs."""
    patterns, found = _Patterns(schema), [NOTHING]
    for pointer, keyword, value in keywords_of(schema):
        where = f"{keyword} at {pointer}"
        if keyword == "pattern" and isinstance(value, str):
            found.append(Part(pattern_extent(value).size, where))
        elif keyword == "patternProperties" and isinstance(value, Mapping):
            found.append(Part(sum(pattern_extent(one).size for one in value), where))
        elif keyword == "multipleOf":
            found.append(Part(_multiples_size(value), where))
        elif keyword in ("allOf", "$ref"):
            count, size = patterns.counted({keyword: value}, 0)
            found.append(Part(intersection(count, size), where))
    return largest(*found)


class _Patterns:
    """Counts the patterns that one string must match, and adds up their sizes."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, tuple[int, int]] = {}

    def of(self, node: Any, depth: int) -> tuple[int, int]:
        """Return the number of patterns for a string of the schema `node`, and their size."""
        if not isinstance(node, Mapping) or depth > MAX_DEPTH:
            return 0, 0
        if id(node) in self._known:
            return self._known[id(node)]
        self._known[id(node)] = (0, 0)  # inside itself, it adds nothing
        self._known[id(node)] = self.counted(node, depth)
        return self._known[id(node)]

    def counted(self, node: Mapping[str, Any], depth: int) -> tuple[int, int]:
        """Return the same for a schema that is looked at for the first time."""
        found = [self.of(one, depth + 1) for one in _listed(node.get("allOf"))]
        if isinstance(node.get("$ref"), str):
            found.append(self.of(resolved(self._root, node["$ref"]), depth + 1))
        for keyword in ("anyOf", "oneOf"):
            options = [self.of(one, depth + 1) for one in _listed(node.get(keyword))]
            found.append(max(options, default=(0, 0)))
        if isinstance(node.get("pattern"), str):
            found.append((1, pattern_extent(node["pattern"]).size))
        if "format" in node:
            found.append((1, FORMAT_SIZE))
        counts, sizes = zip(*found, strict=True)
        return min(sum(counts), CAP), min(sum(sizes), CAP)


def resolved(root: Any, reference: str) -> Any:
    """Return what a reference inside the schema points at; None for any other."""
    if not reference.startswith("#"):
        return None
    node = root
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        elif isinstance(node, Mapping) and name in node:
            node = node[name]
        else:
            return None
    return node


def _multiples_size(value: Any) -> int:
    """Return the size of an automaton for multiples of a number, which has a state for each remainder."""
    try:
        digits = Decimal(str(value)).normalize().as_tuple().digits
    except InvalidOperation:
        return 0
    if not 0 < len(digits) <= 12:
        return CAP if digits else 0
    number = core = int("".join(map(str, digits)))
    for factor in (2, 5):
        while core and core % factor == 0:
            core //= factor
    return max(REMAINDER_SIZE * core, DIGITS_SIZE * number)


def _length(value: Any) -> int:
    try:
        return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError):
        return 0


def _count(value: Any) -> int:
    is_count = isinstance(value, int | float) and not isinstance(value, bool)
    return int(min(max(value, 0), CAP)) if is_count else 0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _size(part: Part) -> int:
    return part.size
