"""`tojson` as transformers has it, with the origin of every character."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lowtide.models.template.origin import holds_message
from lowtide.models.template.traced_text import all_message, as_traced, runs_of, traced


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return the value as JSON.

    Where a message brought a part of the value, it owns the brackets and commas, too. The template's own strings in
    it stay the template's.
    """
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not holds_message((value, indent, separators)):
        return text
    if any('"' in part for part in (*(separators or ()), indent) if isinstance(part, str)):
        return all_message(text)
    mask = bytearray(b"\1" * len(text))
    position = 0
    for string in _strings(value, sort_keys):
        encoded, origin = _encoded(string, ensure_ascii)
        start = text.index(encoded, position)
        position = start + len(encoded)
        mask[start + 1 : position - 1] = origin
    return traced(text, bytes(mask))


def _strings(value: Any, sort_keys: bool) -> Iterator[str]:
    """Yield the strings of the value in the order in which JSON has them, numbers that are keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items()) if sort_keys else value.items():
            yield key if isinstance(key, str) else json.dumps(key)
            yield from _strings(item, sort_keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, sort_keys)


def _encoded(string: str, ensure_ascii: bool) -> tuple[str, bytes]:
    """Return the string in quotes, and the mask of what stands between them."""
    pieces = [
        (json.dumps(piece, ensure_ascii=ensure_ascii)[1:-1], mark)
        for piece, mark in runs_of(as_traced(string))
    ]
    text = "".join(piece for piece, _ in pieces)
    return f'"{text}"', b"".join(mark * len(piece) for piece, mark in pieces)
