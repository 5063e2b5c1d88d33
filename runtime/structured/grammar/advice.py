"""Advice: texts that are likely to lead an unfinished answer to its end. The constraint decides which are legal.

A grammar's mask says what may come next, not what leads to the end: in a string that must contain an identifier all
letters are legal. What the schema says of its strings (patterns, formats, lengths, names that are required) does.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowtide.runtime.structured.grammar.pattern import Pattern, pattern_of
from lowtide.runtime.structured.schema import keywords_of

MAX_PATTERNS = 64
"""Most patterns of a schema, and most required names of one place, that are tried."""
MAX_FILLED = 4000
"""Longest `minLength` that a string is filled up to by advice."""
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_YEAR = r"([1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"  # many validators refuse the year 0
_DATE = _YEAR + r"-(0[1-9]|1[0-2])-(0[1-9]|1\d|2\d|3[01])"
_FORMATS = {
    "date": (f"^{_DATE}$",),
    "time": (f"^{_TIME}$",),
    "date-time": (f"^{_DATE}[tT]{_TIME}$",),
    "duration": (r"^P(\d+W|(\d+[YMD])+(T(\d+[HMS])+)?|T(\d+[HMS])+)$",),
    "email": (r"^\w+([.+-]\w+)*@\w+([.-]\w+)*$", r'^"[^"\\]*"@\w+$'),
    "hostname": (r"^\w+([.-]+\w+)*$",),
    "ipv4": (r"^(\d+\.){3}\d+$",),
    "ipv6": (r"^([0-9a-fA-F]*:){2,7}[0-9a-fA-F]*$", r"^([0-9a-fA-F]+:){7}[0-9a-fA-F]+$"),
    "uuid": (r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",),
    "uri": (r"^[a-z][a-z0-9+.-]*:[^ ]*$",),
}


class Advice(ABC):
    """What is known of the answers beside the grammar."""

    is_json = False
    """Whether answers are JSON values."""

    @abstractmethod
    def texts(self, written: bytes, place: JsonPlace) -> Iterator[bytes]:
        """Yield texts that may lead to the end after `written`, the best first; `place` is where it ends."""


class NoneKnown(Advice):
    """Nothing is known."""

    def texts(self, written: bytes, place: JsonPlace) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())


NONE_KNOWN = NoneKnown()


class WholeText(Advice):
    """The answer as a whole matches a regular expression."""

    def __init__(self, source: str) -> None:
        self._pattern = pattern_of(f"^(?:{source})$", anchored=True)

    def texts(self, written: bytes, place: JsonPlace) -> Iterator[bytes]:
        """Yield the shortest rest of a match."""
        if self._pattern is not None:
            rest = self._pattern.completion(written.decode("utf-8", errors="ignore"))
            if rest:
                yield rest.encode()


class JsonAdvice(Advice):
    """The answer is JSON of a schema."""

    is_json = True

    def __init__(self, schema: Any) -> None:
        names: dict[str, None] = {}
        sources: dict[str, None] = {}
        for _, keyword, value in keywords_of(schema):
            if keyword == "required" and isinstance(value, list):
                names.update((name, None) for name in value if isinstance(name, str))
            sources.update((source, None) for source in _sources(keyword, value))
        self._names = list(names)
        found = (pattern_of(source) for source in list(sources)[:MAX_PATTERNS])
        self._patterns: list[Pattern] = [pattern for pattern in found if pattern is not None]

    def texts(self, written: bytes, place: JsonPlace) -> Iterator[bytes]:
        """Yield ways to end the string that is open: names that are required, then matches of patterns."""
        if place.string_at is None:
            return
        content = _content(written[place.string_at :])
        if content is None:
            return
        if place.is_key:
            found = [name for name in self._names if name.startswith(content)]
            for name in found[:MAX_PATTERNS]:
                yield _escaped(name[len(content) :]) + b'"'
        yield b'"'
        rests: dict[str, None] = {}
        for pattern in self._patterns:
            rest = pattern.completion(content)
            if rest:
                rests[rest] = None
        for rest in sorted(rests, key=len):
            yield _escaped(rest) + b'"'
        for rest in sorted(rests, key=len):
            yield _escaped(rest)


def _sources(keyword: str, value: Any) -> Iterator[str]:
    """Yield the regular expressions that a keyword states."""
    if keyword == "pattern" and isinstance(value, str):
        yield value
    elif keyword == "format" and isinstance(value, str):
        yield from _FORMATS.get(value, ())
    elif keyword == "patternProperties" and isinstance(value, dict):
        yield from value
    elif keyword == "minLength" and isinstance(value, int) and 1 < value <= MAX_FILLED:
        yield f"^.{{{value}}}"


def _escaped(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def _content(written: bytes) -> str | None:
    """Return the text of an open JSON string; None in the middle of a character or an escape."""
    try:
        found = json.loads(b'"' + written + b'"')
    except ValueError:
        return None
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class JsonPlace:
    """Where a JSON text ends: in which containers, and in which string."""

    num_bytes: int = 0
    containers: bytes = b""
    string_at: int | None = None
    """Where the content of the open string begins; None outside strings."""
    is_key: bool = False
    """Whether that string is the name of a property, or the next string is one."""
    is_escaped: bool = False

    def is_like(self, other: JsonPlace) -> bool:
        """Whether the same text that completes a JSON value at one place completes one at the other, if it is legal.

        Not so outside of containers and strings: a number may be complete or not.
        """
        is_in_string = self.string_at is not None
        return (
            self.containers == other.containers
            and is_in_string == (other.string_at is not None)
            and self.is_escaped == other.is_escaped
            and (is_in_string or bool(self.containers))
        )

    def after(self, written: bytes) -> JsonPlace:
        """Return the place at the end of `written`, whose first `num_bytes` bytes were read already."""
        containers, string_at = self.containers, self.string_at
        is_key, is_escaped = self.is_key, self.is_escaped
        for at in range(self.num_bytes, len(written)):
            byte = written[at]
            if string_at is not None:
                if is_escaped:
                    is_escaped = False
                elif byte == 0x5C:
                    is_escaped = True
                elif byte == 0x22:
                    string_at = None
            elif byte == 0x22:
                string_at = at + 1
            elif byte in b"{[":
                containers += bytes([byte])
                is_key = byte == 0x7B
            elif byte in b"}]":
                containers = containers[:-1]
            elif byte in b":,":
                is_key = byte == 0x2C and containers.endswith(b"{")
        return JsonPlace(len(written), containers, string_at, is_key, is_escaped)


START = JsonPlace()
