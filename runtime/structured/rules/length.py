"""Length: how many characters or words an answer has."""

from __future__ import annotations

import sys
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.rules.byte_table import ByteTable, table_of
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.rules.token_order import TokenOrder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.runtime.structured.rules.text_rule import Mask

_BLANKS = tuple(chr(number).encode() for number in range(0x3001) if chr(number).isspace())
"""What separates words in Python's `str.split`."""
_BROKEN = "not UTF-8"
State = tuple[int, int]
"""The state of the table, and the count so far, which is never above the least count where there is no limit."""


class LengthRule(TextRule):
    """Between `least` and `most` characters or words; the answer is UTF-8.

    Words are what Python's `str.split` returns: they are separated by white space.
    """

    start: State = (0, 0)

    def __init__(self, unit: str, least: int = 0, most: int | None = None) -> None:
        self._unit, self._least, self._most = unit, least, most

    @property
    def _automaton(self) -> tuple[ByteTable, NDArray[np.int8], list[Any]]:
        return _automaton(self._unit)

    @cached_property
    def _broken(self) -> int:
        return self._automaton[2].index(_BROKEN)

    def _counted(self, count: int) -> int:
        """Return a count as the state holds it: equal states have equal futures."""
        return count if self._most is not None else min(count, self._least)

    def step(self, state: State, text: bytes) -> State | None:
        """Return the state behind `text`; None where it has too many characters or words."""
        table, amounts, _ = self._automaton
        at, count = state
        for byte in text:
            count += int(amounts[at, byte])
            at = table.step(at, byte)
        if (
            at == self._broken
            or count > self._limit
            or (count == self._limit and self._ends_word(at))
        ):
            return None
        return at, self._counted(count)

    @property
    def _limit(self) -> int:
        return sys.maxsize if self._most is None else self._most

    def legal(self, state: State, tokens: TokenOrder) -> Mask:
        """Return which tokens leave the answer inside its length."""
        import numpy as np

        table, amounts, _ = self._automaton
        states, counts = tokens.add_along(table, state[0], amounts)
        left = self._limit - state[1]
        legal: Mask = (states != self._broken) & (counts <= left)
        if self._unit == "words" and self._most:
            between = [
                number for number in range(len(self._automaton[2])) if self._ends_word(number)
            ]
            legal &= (counts < left) | ~np.isin(states, between)
        return legal

    def _ends_word(self, at: int) -> bool:
        """Whether white space is behind a word: the last word has none, so that the answer ends with it."""
        if self._unit != "words" or not self._most:
            return False
        return bool(self._automaton[2][at] == (False, b""))

    def _is_whole(self, at: int) -> bool:
        """Whether the text ends with a whole character."""
        found = self._automaton[2][at]
        return bool((found[1] if self._unit == "words" else found) == b"")

    def is_accepting(self, state: State) -> bool:
        """Whether the answer is long enough, and ends with a whole character."""
        return state[1] >= self._least and self._is_whole(state[0])

    def is_done(self, state: State) -> bool:
        """Whether no character may follow."""
        return state[1] == self._most and self._unit != "words" and self.is_accepting(state)

    def ending(self, state: State) -> bytes:
        """Return the rest of an open character, and as many characters or words as are missing."""
        at, count = state
        table, amounts, _ = self._automaton
        written = bytearray()
        while not self._is_whole(at):
            # The highest byte that goes on: a character that is no white space.
            byte = next(b for b in range(0xBF, 0x7F, -1) if table.step(at, b) != self._broken)
            count += int(amounts[at, byte])
            at = table.step(at, byte)
            written.append(byte)
        missing = max(self._least - count, 0)
        if self._unit != "words":
            return bytes(written) + b"." * missing
        if missing and self._automaton[2][at][0]:
            written += b" "
        return bytes(written) + b" ".join([b"-"] * missing)

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        table, amounts, _ = self._automaton
        return table.num_bytes + int(amounts.nbytes)


@cache
def _automaton(unit: str) -> tuple[ByteTable, NDArray[np.int8], list[Any]]:
    """Return the table that counts, which all rules of a unit share."""
    if unit == "words":
        return table_of((False, b""), _word_step)
    return table_of(b"", _character_step)


def _begins_character(text: bytes) -> bool:
    """Whether bytes that are no whole character can become one."""
    first, *others = text
    length = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    if not 0xC2 <= first <= 0xF4 or len(text) >= length:
        return False
    low = {0xE0: 0xA0, 0xF0: 0x90}.get(first, 0x80)
    high = {0xED: 0x9F, 0xF4: 0x8F}.get(first, 0xBF)
    ranges = [(low, high), (0x80, 0xBF)]
    return all(a <= byte <= b for byte, (a, b) in zip(others, ranges, strict=False))


def _is_character(text: bytes) -> bool:
    try:
        return len(text.decode()) == 1
    except UnicodeDecodeError:
        return False


def _shortened(text: bytes) -> bytes:
    """Return one start of a character for all that go on in the same way, apart from white space."""
    if any(blank.startswith(text) for blank in _BLANKS):
        return text
    length = 2 if text[0] < 0xE0 else 3 if text[0] < 0xF0 else 4
    if len(text) == 1 and text[0] in (0xE0, 0xED, 0xF0, 0xF4):
        return text
    missing = length - len(text)
    return {1: b"\xc3", 2: b"\xe5", 3: b"\xf1"}[missing]


def _character_step(state: Any, byte: int) -> tuple[Any, int]:
    """Return the start of the character that is open, and 1 where a character begins."""
    if state == _BROKEN:
        return _BROKEN, 0
    text = state + bytes((byte,))
    amount = int(not state)
    if _is_character(text):
        return b"", amount
    return (_shortened(text), amount) if _begins_character(text) else (_BROKEN, 0)


def _word_step(state: Any, byte: int) -> tuple[Any, int]:
    """Return whether a word is open and the start of the open character; 1 where a word may have begun, -1 where not.

    A character that is open counts as one of a word until it turns out to be white space.
    """
    if state == _BROKEN:
        return _BROKEN, 0
    in_word, begun = state
    text = begun + bytes((byte,))
    counted = in_word or bool(begun)
    if text in _BLANKS:
        return (False, b""), -1 if begun and not in_word else 0
    if _is_character(text):
        return (True, b""), int(not counted)
    if not _begins_character(text):
        return _BROKEN, 0
    return (in_word, _shortened(text)), int(not counted)
