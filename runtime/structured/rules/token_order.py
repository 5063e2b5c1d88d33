"""TokenOrder: the tokens of a vocabulary in two orders, to ask an automaton about all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.vocabulary import TokenVocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.runtime.structured.rules.byte_table import ByteTable

    Mask = NDArray[np.bool_]


class TokenOrder:
    """Tokens by their bytes, as a trie is walked, and by their lengths, as a table is followed.

    Takes 12 bytes a token beside the bytes of the vocabulary.
    """

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        import numpy as np

        self.bytes_of = vocabulary.bytes_of
        self.num_tokens = vocabulary.num_tokens
        text, starts = vocabulary.packed
        self._text = np.frombuffer(text, np.uint8)
        edges = np.frombuffer(starts, np.uint32)
        lengths = np.diff(edges.astype(np.int64))
        self.has_text = lengths > 0
        self._by_length = np.argsort(-lengths, kind="stable").astype(np.int32)
        self._starts = edges[:-1][self._by_length].astype(np.int64)
        ordered = -lengths[self._by_length]
        longest = int(lengths.max(initial=0))
        # How many tokens have more than j bytes, for each j.
        self._num_longer = [int(np.searchsorted(ordered, -j)) for j in range(longest)]
        spelled = (token_id for token_id in range(self.num_tokens) if lengths[token_id])
        self._by_text = np.fromiter(sorted(spelled, key=self.bytes_of), np.int32)

    def follow(self, table: ByteTable, state: int) -> NDArray[np.int32]:
        """Return the state of `table` behind each token from `state`, int32 of shape (vocabulary,)."""
        import numpy as np

        states = np.full(self.num_tokens, state, np.int32)
        for at, count in enumerate(self._num_longer):
            kinds = table.kind_of[self._text[self._starts[:count] + at]]
            states[:count] = table.next_state[states[:count], kinds]
        found = np.empty_like(states)
        found[self._by_length] = states
        return found

    def add_along(self, table: ByteTable, state: int, amounts: NDArray[np.int8]) -> Any:
        """Follow a table; return the states behind the tokens, and the sum of `amounts` on each one's way.

        `amounts` has the shape of the table: (states, kinds of bytes).
        """
        import numpy as np

        states = np.full(self.num_tokens, state, np.int32)
        sums = np.zeros(self.num_tokens, np.int32)
        for at, count in enumerate(self._num_longer):
            kinds = table.kind_of[self._text[self._starts[:count] + at]]
            sums[:count] += amounts[states[:count], kinds]
            states[:count] = table.next_state[states[:count], kinds]
        found, totals = np.empty_like(states), np.empty_like(sums)
        found[self._by_length], totals[self._by_length] = states, sums
        return found, totals

    def walk(
        self, state: Any, step: Callable[[Any, bytes], Any], next_bytes: Callable[[Any], bytes]
    ) -> Mask:
        """Return which tokens an automaton with few ways allows from `state`: it is asked byte by byte.

        `next_bytes` returns the bytes that may follow a state.
        """
        import numpy as np

        legal = np.zeros(self.num_tokens, np.bool_)
        waiting = [(0, len(self._by_text), 0, state)]
        while waiting:
            low, high, depth, at = waiting.pop()
            while depth and low < high and len(self._text_at(low)) == depth:
                legal[self._by_text[low]] = True
                low += 1
            if low == high:
                continue
            for byte in next_bytes(at):
                first = self._first(low, high, depth, byte)
                last = self._first(first, high, depth, byte + 1)
                if first < last:
                    behind = step(at, bytes((byte,)))
                    if behind is not None:
                        waiting.append((first, last, depth + 1, behind))
        return legal

    def _text_at(self, index: int) -> bytes:
        return self.bytes_of(int(self._by_text[index]))

    def _first(self, low: int, high: int, depth: int, byte: int) -> int:
        """Return the first index in a range of one prefix whose byte at `depth` is at least `byte`."""
        while low < high:
            middle = (low + high) // 2
            if self._text_at(middle)[depth] < byte:
                low = middle + 1
            else:
                high = middle
        return low
