"""Automata over bytes as tables; the one that finds texts (Aho and Corasick, 1975)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TABLE_BYTES = 32 * MIB
"""Larger tables would take a part of the budget that nobody expects of a list of texts."""


@dataclass(frozen=True)
class ByteTable:
    """`next_state[state, kind_of[byte]]`: the state behind a byte; bytes that no state tells apart share a kind."""

    kind_of: NDArray[np.uint8]
    next_state: NDArray[np.int32]

    @cached_property
    def _rows(self) -> memoryview:
        return self.next_state.data

    @cached_property
    def _kinds(self) -> bytes:
        return self.kind_of.tobytes()

    def step(self, state: int, byte: int) -> int:
        """Return the state behind one byte."""
        found: int = self._rows[state, self._kinds[byte]]
        return found

    def steps(self, state: int, text: bytes) -> int:
        """Return the state behind a text."""
        rows, kinds = self._rows, self._kinds
        for byte in text:
            state = rows[state, kinds[byte]]
        return state

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return int(self.next_state.nbytes + 2 * self.kind_of.nbytes)


class TextMatcher:
    """Finds texts in bytes that arrive piece by piece: state 0 is the start, `hits` the states behind a text.

    With `is_absorbing` a state behind a text is never left. Raises `BadOption` for too many texts.
    """

    def __init__(self, texts: Sequence[bytes], *, is_absorbing: bool = False) -> None:
        import numpy as np

        used = sorted(set(b"".join(texts)))
        num_kinds = len(used) + (len(used) < 256)
        num_states = 1 + sum(map(len, texts))
        if 4 * num_states * num_kinds > MAX_TABLE_BYTES:
            raise BadOption(
                f"{len(texts):,} texts with {num_states - 1:,} bytes in all are too many to look for: pass fewer"
            )
        kind_of = np.full(256, num_kinds - 1, np.uint8)
        kind_of[used] = np.arange(len(used))
        rows = np.zeros((num_states, num_kinds), np.int32)
        self.found: list[int] = [0]
        """For each state, the texts that end there, as bits; only whether any does where the matcher is absorbing."""
        self.prefixes: list[bytes] = [b""]
        """For each state, the longest start of a text that the bytes so far end with; not where it is absorbing."""
        count = 1
        for number, text in enumerate(texts):
            state = 0
            for at, byte in enumerate(text):
                kind = kind_of[byte]
                if not rows[state, kind]:
                    rows[state, kind] = count
                    self.found.append(0)
                    self.prefixes.append(b"" if is_absorbing else text[: at + 1])
                    count += 1
                state = int(rows[state, kind])
            self.found[state] |= 1 << (0 if is_absorbing else number)
        rows = rows[:count]
        shorter = [0] * count
        order = [state for state in rows[0].tolist() if state]
        for state in order:  # grows while it is read: breadth first
            back = shorter[state]
            self.found[state] |= self.found[back]
            children = [(kind, child) for kind, child in enumerate(rows[state].tolist()) if child]
            for kind, child in children:
                shorter[child] = int(rows[back, kind])
                order.append(child)
            own = dict(children)
            rows[state] = rows[back]
            for kind, child in own.items():
                rows[state, kind] = child
        self.hits = np.array([bits != 0 for bits in self.found], np.bool_)
        if is_absorbing:
            rows[self.hits] = np.flatnonzero(self.hits)[:, None]
        self.table = ByteTable(kind_of, rows)


def table_of(
    start: Hashable, step: Callable[[Any, int], tuple[Any, int]]
) -> tuple[ByteTable, NDArray[np.int8], list[Any]]:
    """Return the table of an automaton that a function describes, what each step adds, and the states by number.

    `step` returns the state behind a byte and the amount that it adds.
    """
    import numpy as np

    states: list[Any] = [start]
    number = {start: 0}
    rows, amounts = [], []
    for state in states:  # grows while it is read
        row, added = [], []
        for byte in range(256):
            behind, amount = step(state, byte)
            if behind not in number:
                number[behind] = len(states)
                states.append(behind)
            row.append(number[behind])
            added.append(amount)
        rows.append(row)
        amounts.append(added)
    table = ByteTable(np.arange(256, dtype=np.uint8), np.array(rows, np.int32))
    return table, np.array(amounts, np.int8), states
