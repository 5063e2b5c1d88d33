"""Network: texts made of words, where each word decides which words may follow.

Lists of choices, paths of a graph and plans are networks. Nothing is copied for each text: memory is that of the words
and of what connects them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

Place = Any
"""Where in the network a word is written; None behind the last word."""
MAX_COMPARED = 256
"""Most words of one place that are compared for the shortest end."""


class SortedTexts:
    """Texts in the order of their bytes, one after the other; 4 bytes each beside their own."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        found = sorted(set(texts))
        self._joined = b"".join(found)
        self._starts = array("I", accumulate(map(len, found), initial=0))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._joined[self._starts[index] : self._starts[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts and their places."""
        return len(self._joined) + 4 * len(self._starts)


class Network(ABC):
    """Words by place: those of a place are numbered in the order of their bytes, doubles next to each other."""

    start: Place

    @abstractmethod
    def range_of(self, place: Place) -> tuple[int, int]:
        """Return the number of the first word of a place, and the one behind its last."""

    @abstractmethod
    def word(self, place: Place, number: int) -> bytes:
        """Return a word of a place."""

    @abstractmethod
    def behind(self, place: Place, first: int, last: int) -> Sequence[tuple[bytes, Place]]:
        """Return what may follow the word with the numbers from `first` up to `last`.

        That is a text between words, and the place of the next word: None where the text ends behind it.
        """

    @abstractmethod
    def rest(self, place: Place) -> bytes:
        """Return a short text from a place to the end."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the network."""


_Word = tuple[Place, int, int, int]
"""A word that is being written: its place, the numbers of the words that it may be, and how many bytes are written."""
_Between = tuple[bytes, Place]
"""A text between words that is being written: what is left of it, and the place behind it."""
Ways = tuple[frozenset[_Word], frozenset[_Between]]
"""All readings of the bytes so far. `(b"", None)` among the second is the end."""
END: _Between = (b"", None)


class NetworkReader:
    """Follows a network byte by byte. One text may have several readings: a word may be the start of another."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.start = self.at(network.start)

    def at(self, place: Place) -> Ways:
        """Return the reading at the start of a place."""
        return frozenset([(place, *self.network.range_of(place), 0)]), frozenset()

    def step(self, ways: Ways, byte: int) -> Ways | None:
        """Return the readings behind a byte; None where there are none."""
        words, between = set[_Word](), set[_Between]()
        for place, low, high, depth in ways[0]:
            first, last = self._narrowed(place, low, high, depth, byte)
            if first < last:
                self._add_word(words, between, place, first, last, depth + 1)
        for text, place in ways[1]:
            if text and text[0] == byte:
                self._add_text(words, between, text[1:], place)
        return (frozenset(words), frozenset(between)) if words or between else None

    def _add_word(
        self,
        words: set[_Word],
        between: set[_Between],
        place: Place,
        low: int,
        high: int,
        depth: int,
    ) -> None:
        """Add a word that is being written, and what may follow where it is complete."""
        whole = low
        if len(self.network.word(place, low)) == depth:
            whole = self._behind_whole(place, low, high, depth)
            for text, following in self.network.behind(place, low, whole):
                self._add_text(words, between, text, following)
        if whole < high:
            words.add((place, whole, high, depth))

    def _add_text(
        self, words: set[_Word], between: set[_Between], text: bytes, place: Place
    ) -> None:
        if text or place is None:
            between.add((text, place))
            return
        low, high = self.network.range_of(place)
        if low < high:
            words.add((place, low, high, 0))

    def _behind_whole(self, place: Place, low: int, high: int, depth: int) -> int:
        """Return the number behind the words that have no more than `depth` bytes."""
        while low < high:
            middle = (low + high) // 2
            if len(self.network.word(place, middle)) == depth:
                low = middle + 1
            else:
                high = middle
        return low

    def _narrowed(
        self, place: Place, low: int, high: int, depth: int, byte: int
    ) -> tuple[int, int]:
        """Return the words of a range, all of which are longer than `depth`, that have a byte there."""
        word = self.network.word

        def first(low: int, high: int, least: int) -> int:
            while low < high:
                middle = (low + high) // 2
                if word(place, middle)[depth] < least:
                    low = middle + 1
                else:
                    high = middle
            return low

        low = first(low, high, byte)
        return low, first(low, high, byte + 1)

    def next_bytes(self, ways: Ways) -> bytes:
        """Return the bytes that may come next."""
        found = {text[0] for text, _ in ways[1] if text}
        word = self.network.word
        for place, low, high, depth in ways[0]:
            while low < high:
                byte = word(place, low)[depth]
                found.add(byte)
                _, low = self._narrowed(place, low, high, depth, byte)
        return bytes(sorted(found))

    def ending(self, ways: Ways) -> bytes:
        """Return a short text to the end."""
        found = [
            text + (self.network.rest(place) if place is not None else b"")
            for text, place in ways[1]
        ]
        for place, low, high, depth in ways[0]:
            numbers = range(low, min(high, low + MAX_COMPARED))
            number = min(numbers, key=lambda i, at=place: len(self.network.word(at, i)))  # type: ignore[misc]
            word = self.network.word(place, number)
            last = self._behind_whole_of(place, number, high)
            rests = [
                text + (self.network.rest(behind) if behind is not None else b"")
                for text, behind in self.network.behind(place, number, last)
            ]
            found += [word[depth:] + rest for rest in rests]
        return min(found, key=len)

    def _behind_whole_of(self, place: Place, number: int, high: int) -> int:
        """Return the number behind the doubles of a word."""
        word = self.network.word(place, number)
        low = number + 1
        while low < high:
            middle = (low + high) // 2
            if self.network.word(place, middle) == word:
                low = middle + 1
            else:
                high = middle
        return low

    def forced(self, ways: Ways) -> bytes:
        """Return the bytes that must come next."""
        found = b""
        at: Ways | None = ways
        while at is not None and END not in at[1]:
            following = self.next_bytes(at)
            if len(following) != 1:
                break
            found += following
            at = self.step(at, following[0])
        return found


class OneOf(Network):
    """One text of a list."""

    start = 0

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._texts = SortedTexts(texts)

    def range_of(self, place: int) -> tuple[int, int]:
        """Return the range of all texts."""
        return 0, len(self._texts)

    def word(self, place: int, number: int) -> bytes:
        """Return a text."""
        return self._texts[number]

    def behind(self, place: int, first: int, last: int) -> Sequence[tuple[bytes, Place]]:
        """Return that the answer ends."""
        return (END,)

    def rest(self, place: int) -> bytes:
        """Return the shortest text."""
        return min(self._texts, key=len)

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts."""
        return self._texts.num_bytes
