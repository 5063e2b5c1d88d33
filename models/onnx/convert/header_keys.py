"""HeaderKeys: everything that a GGUF header says, long arrays included, which `read_gguf` only measures.

Reads headers that `read_gguf` has found sound.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from lowtide.models.errors import BadModelFile
from lowtide.models.gguf_reader import GgufContents

_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""GGUF's numbers of scalar types, as `struct` names them."""
_STRING, _ARRAY = 8, 9


class HeaderKeys:
    """The keys of one file, with typed look-ups whose errors name the key."""

    def __init__(self, contents: GgufContents) -> None:
        self.path: Path = contents.path
        with contents.path.open("rb") as file:
            self._data = file.read(contents.metadata_end)
        self._position = 24
        self._values = {
            self._text(): self._value(self._number("I")) for _ in range(contents.num_keys)
        }
        self.architecture = str(self._values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands; arrays are lists."""
        return self._values.get(key, default)

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """Return the value of "<architecture>.KEY"."""
        return self.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the architecture; raises `BadModelFile` where it is missing or none."""
        value = self.of_architecture(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadModelFile(
                f"{self.path}: the header's {self.architecture}.{key} is {value!r}, a number is wanted"
            )
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list of `kind`, empty where there is none; raises `BadModelFile` for others."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise BadModelFile(
                f"{self.path}: the header's {key} is no list of {kind.__name__}: fetch the file again"
            )
        return value

    def _number(self, letter: str) -> Any:
        layout = struct.Struct("<" + letter)
        (value,) = layout.unpack_from(self._data, self._position)
        self._position += layout.size
        return value

    def _text(self) -> str:
        length = self._number("Q")
        start = self._position
        self._position = start + length
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_FORMATS[kind])
        item_kind, length = self._number("I"), self._number("Q")
        if item_kind == _STRING:
            return [self._text() for _ in range(length)]
        layout = struct.Struct(f"<{length}{_FORMATS[item_kind]}")
        values = list(layout.unpack_from(self._data, self._position))
        self._position += layout.size
        return values
