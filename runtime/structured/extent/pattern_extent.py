"""The extent of a regular expression: its shortest match, and its characters with every count written out.

It reads loosely and never fails: what it does not know counts as one character, and as none of the shortest match.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from lowtide.runtime.structured.extent.extent import CAP

_COUNTS = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_GROUP = re.compile(r"\?(?:P?<(?![=!])[^>]*>|[a-zA-Z-]*(?P<end>[:)])|(?P<look><?[=!]))")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\]\\\[])*\]?", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[pPxu]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.|$)", re.DOTALL)
_EMPTY = ("b", "B", "A", "z", "Z", "G")


class PatternExtent(NamedTuple):
    """Characters of the shortest match, and of the whole pattern."""

    least: int = 0
    size: int = 0


_NONE = PatternExtent()


@dataclass(slots=True)
class _Group:
    """A group that is being read: the alternatives so far, the current one, and its last item."""

    is_look_around: bool = False
    least: int | None = None
    size: int = 0
    sequence: PatternExtent = _NONE
    last: PatternExtent = _NONE

    def push(self, item: PatternExtent) -> None:
        """Add an item to the current alternative."""
        before, last = self.sequence, self.last
        self.sequence = PatternExtent(
            min(before.least + last.least, CAP), min(before.size + last.size, CAP)
        )
        self.last = item

    def end_alternative(self) -> None:
        """Begin the next alternative."""
        self.push(_NONE)
        self.least = (
            self.sequence.least if self.least is None else min(self.least, self.sequence.least)
        )
        self.size = min(self.size + self.sequence.size, CAP)
        self.sequence = _NONE

    def whole(self) -> PatternExtent:
        """Return the group as an item; a look-around is no part of the match."""
        self.end_alternative()
        return PatternExtent(0 if self.is_look_around else self.least or 0, self.size)


def pattern_extent(source: str) -> PatternExtent:
    """Return the extent of a regular expression."""
    return _Reader(source).read()


class _Reader:
    """Reads a pattern from left to right, without recursion."""

    def __init__(self, source: str) -> None:
        self._source, self._at = source, 0
        self._groups = [_Group()]
        self._is_verbose = False
        self._was_count = False  # whether the last symbol said how often an item comes

    def read(self) -> PatternExtent:
        """Return the extent of the whole pattern."""
        while self._at < len(self._source):
            symbol, was_count = self._source[self._at], self._was_count
            self._was_count = False
            self._at += 1
            if symbol in "*+?{" and self._count(symbol, was_count=was_count):
                self._was_count = True
            elif symbol == "(":
                self._open()
            elif symbol == ")":
                self._close()
            elif symbol == "|":
                self._groups[-1].end_alternative()
            elif symbol not in "^$":
                self._groups[-1].push(self._item(symbol))
        while len(self._groups) > 1:
            self._close()
        return self._groups[0].whole()

    def _count(self, symbol: str, *, was_count: bool) -> bool:
        """Apply how often the last item comes; return False for a brace that is a character."""
        group = self._groups[-1]
        if symbol == "{":
            found = _COUNTS.match(self._source, self._at - 1)
            if found is None:
                return False
            group.last = _repeated(group.last, found[1], found[2])
            self._at = found.end()
        elif not (
            was_count and symbol in "+?"
        ):  # behind a count it says how to match, not how often
            group.last = PatternExtent(group.last.least * (symbol == "+"), group.last.size)
        return True

    def _open(self) -> None:
        header = _GROUP.match(self._source, self._at)
        if header is not None:
            self._at = header.end()
            self._is_verbose |= bool(header["end"]) and "x" in header[0]
        if header is None or header["end"] != ")":
            self._groups.append(_Group(bool(header and header["look"])))

    def _close(self) -> None:
        if len(self._groups) > 1:
            group = self._groups.pop()
            self._groups[-1].push(group.whole())

    def _item(self, symbol: str) -> PatternExtent:
        """Read a character, a class or an escape."""
        expected = {"[": _CLASS, "\\": _ESCAPE}.get(symbol)
        found = expected.match(self._source, self._at - 1) if expected else None
        if found is None:
            return PatternExtent(int(not (self._is_verbose and symbol in " \t\n#")), 1)
        self._at = found.end()
        is_empty = symbol == "\\" and (found[0][1:] in _EMPTY or found[0][1:].isdigit())
        return PatternExtent(int(not is_empty), 1)


def _repeated(item: PatternExtent, low: str, high: str | None) -> PatternExtent:
    """Return an item as often as a count asks for; optional copies are made when a text needs them."""
    least = number(low)
    return PatternExtent(
        min(item.least * least, CAP), min(item.size * max(least + (high is not None), 1), CAP)
    )


def number(digits: str) -> int:
    """Return a count that may have any number of digits."""
    return CAP if len(digits) > 12 else min(int(digits or 0), CAP)
