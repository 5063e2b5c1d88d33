"""Reads protocol buffers field by field, trusting nothing that the file says.

Knows the wire format, not what the fields mean. Nothing is copied but what is asked for: a field of bytes
is told by where it lies.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowtide.models.errors import BadModelFile

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


@dataclass(frozen=True, slots=True)
class Field:
    """Field `number` of a message: its `value` where it is a number, its bytes from `start` to `end`."""

    number: int
    kind: int
    value: int
    start: int
    end: int


class Wire:
    """The bytes of one file of messages."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message in [start, end); raises `BadModelFile` where it is none."""
        position = start
        while position < end:
            key, position = self._varint(position, end)
            number, kind = key >> 3, key & 7
            if kind == VARINT:
                value, after = self._varint(position, end)
                yield Field(number, kind, value, position, after)
                position = after
                continue
            if kind == BYTES:
                length, position = self._varint(position, end)
            elif kind in _FIXED:
                length = _FIXED[kind]
            else:
                raise self.broken(position, f"a field has the unknown wire type {kind}")
            if length > end - position:
                raise self.broken(position, f"a field claims {length} bytes beyond its message")
            yield Field(number, kind, 0, position, position + length)
            position += length

    def text(self, field: Field) -> str:
        """Return a field of text."""
        return self.data[field.start : field.end].decode("utf-8", errors="replace")

    def numbers(self, field: Field) -> list[int]:
        """Return the whole numbers of a repeated field, packed or one by one; negative ones are signed."""
        if field.kind == VARINT:
            return [_signed(field.value)]
        found, position = [], field.start
        while position < field.end:
            value, position = self._varint(position, field.end)
            found.append(_signed(value))
        return found

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self.data[position]
            value |= (byte & 0x7F) << shift
            position += 1
            if byte < 0x80:
                return value & ((1 << 64) - 1), position
            shift += 7
        raise self.broken(position, "a number has no end")

    def broken(self, position: int, reason: str) -> BadModelFile:
        """Return the error that says where the file cannot be read."""
        return BadModelFile(
            f"{self.path} is not a sound ONNX file: {reason} (near byte {position}); "
            "fetch or export it again"
        )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
