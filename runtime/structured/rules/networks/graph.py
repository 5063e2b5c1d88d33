"""Graph: the paths of a knowledge graph as a network, without a list of the paths.

Graph-constrained reasoning (Luo et al. 2024, arXiv 2410.13080) writes paths of up to a number of hops, and puts all of
them into a trie. The triples, sorted by their names, say the same: a path is a way through them. They take 12 bytes
each, however many paths there are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.networks.network import Network, Place, SortedTexts

Triple = tuple[str, str, str]
_HEAD, _RELATION, _TAIL = "head", "relation", "tail"


class Graph(Network):
    """Paths `head, relation, tail, relation, ...` of 1 to `max_hops` hops, with `arrow` between names and `end` last.

    They begin at one of `starts`, or at any head. Raises `BadOption` where that leaves no path.
    """

    start: Place = (_HEAD, 0, 0, 0)

    def __init__(
        self,
        triples: Iterable[Triple],
        *,
        arrow: str,
        end: str,
        max_hops: int,
        starts: Sequence[str] = (),
    ) -> None:
        given = sorted({tuple(name.encode() for name in triple) for triple in triples})
        self._names = SortedTexts(name for triple in given for name in triple)
        number = {name: i for i, name in enumerate(self._names)}
        self._heads, self._relations, self._tails = (
            array("I", (number[triple[i]] for triple in given)) for i in range(3)
        )
        self._arrow, self._end, self._max_hops = arrow.encode(), end.encode(), max_hops
        wanted = {one.encode() for one in starts}
        missing = sorted(wanted - {triple[0] for triple in given})
        if missing:
            raise BadOption(f"no triple begins with {missing[0].decode()!r}: name the head of one")
        chosen = sorted(number[one] for one in wanted) if wanted else sorted(set(self._heads))
        self._starts = array("I", chosen)
        if not chosen:
            raise BadOption("there are no triples, so no path exists; name a file with some")

    def range_of(self, place: Place) -> tuple[int, int]:
        """Return the numbers of the words of a place: heads, or triples from `first` up to `last`."""
        kind, first, last, _ = place
        return (0, len(self._starts)) if kind == _HEAD else (first, last)

    def word(self, place: Place, number: int) -> bytes:
        """Return a name."""
        column: Any = {_HEAD: self._starts, _RELATION: self._relations, _TAIL: self._tails}[
            place[0]
        ]
        return self._names[column[number]]

    def behind(self, place: Place, first: int, last: int) -> Sequence[tuple[bytes, Place]]:
        """Return what may follow a name."""
        kind, _, _, hops = place
        if kind == _HEAD:
            return ((self._arrow, (_RELATION, *self._triples_of(self._starts[first]), hops)),)
        if kind == _RELATION:
            return ((self._arrow, (_TAIL, first, last, hops)),)
        ends: tuple[bytes, Place] = (self._end, None)
        low, high = self._triples_of(self._tails[first])
        if low == high or hops + 1 >= self._max_hops:
            return (ends,)
        return (ends, (self._arrow, (_RELATION, low, high, hops + 1)))

    def _triples_of(self, head: int) -> tuple[int, int]:
        return bisect_left(self._heads, head), bisect_right(self._heads, head)

    def rest(self, place: Place) -> bytes:
        """Return the path of one hop, with the first names that may come."""
        kind, first, last, _ = place
        if kind == _TAIL:
            tail = min(range(first, min(last, first + 256)), key=lambda i: len(self.word(place, i)))
            return self.word(place, tail) + self._end
        if kind == _RELATION:
            name = self.word(place, first)
            behind = first + 1
            while behind < last and self._relations[behind] == self._relations[first]:
                behind += 1
            return name + self._arrow + self.rest((_TAIL, first, behind, 0))
        head = self._starts[0]
        return self._names[head] + self._arrow + self.rest((_RELATION, *self._triples_of(head), 0))

    @property
    def num_bytes(self) -> int:
        """Bytes of the names, the triples and the starts."""
        return self._names.num_bytes + 12 * len(self._heads) + 4 * len(self._starts)


def read_triples(text: str) -> list[Triple]:
    """Return the triples of a text: one a line, with tabs between head, relation and tail, or with commas (CSV).

    Empty lines and lines that begin with # are skipped. Raises `BadOption` for another line.
    """
    import csv

    triples: list[Triple] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = line.split("\t") if "\t" in line else next(csv.reader([line]))
        names = [name.strip() for name in found]
        if len(names) != 3 or not all(names):
            raise BadOption(
                f"line {number} of the triples is {line[:60]!r}: write head, relation and tail with tabs or commas "
                "between them"
            )
        triples.append((names[0], names[1], names[2]))
    return triples
