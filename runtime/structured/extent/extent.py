"""Extent: the shortest answer that a format allows, and the size of what it is expanded to."""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.models.errors import BadOption

MAX_SIZE = 1_000_000
"""Largest expanded size that the grammar library is asked for: it takes tens of milliseconds and some megabytes."""
CAP = 10**12
"""Counts are cut off here: written out, they may have any number of digits."""
REMAINDER_SIZE, DIGITS_SIZE = 100, 10
"""Size of an automaton that counts remainders, for each of them: without and with the powers of ten."""


@dataclass(frozen=True, slots=True)
class Part:
    """A number of characters, and the keyword or rule that most of them come from ("" where that is the whole)."""

    size: int = 0
    where: str = ""

    def times(self, count: int, where: str = "") -> Part:
        """Return the part `count` times, which is what `where` asks for if that is more than the part itself."""
        larger = where if count > self.size else self.where
        return Part(min(self.size * count, CAP), larger or where)


NOTHING = Part()


@dataclass(frozen=True, slots=True)
class Extent:
    """What is known before anything is built.

    `shortest` is a lower bound of the bytes of an answer. `expanded` estimates the states of the automata: characters
    times counts, doubled for each further pattern that the same text must match. Building it takes at most about
    `num_bytes`.
    """

    shortest: Part = NOTHING
    expanded: Part = NOTHING
    num_bytes: int = 0

    def check(self) -> None:
        """Raise `BadOption` for what is too large to be built."""
        size, where = self.expanded.size, self.expanded.where
        if size > MAX_SIZE:
            named = f": {where}" if where else ""
            raise BadOption(
                f"the constraint is expanded to about {size:,} characters{named}, but at most {MAX_SIZE:,} can be "
                "used: lower its counts, or match fewer patterns at once"
            )

    def longer_than(self, num_bytes: int) -> str | None:
        """Return why no answer has so few bytes; None where one may."""
        size, where = self.shortest.size, self.shortest.where
        if size <= num_bytes:
            return None
        at_least = "at least " if size >= CAP else ""
        return f"{where or 'it'} asks for {at_least}{size:,} characters"


UNKNOWN = Extent()


def largest(*parts: Part) -> Part:
    """Return the largest of several parts; of equal ones, the first that is named."""
    return max(parts, key=lambda part: (part.size, bool(part.where)), default=NOTHING)


def total(*parts: Part) -> Part:
    """Return several parts one after the other."""
    return Part(min(sum(part.size for part in parts), CAP), largest(*parts).where)


def intersection(num_patterns: int, size: int) -> int:
    """Return the size of several patterns that one text must match; each may double the work of the others."""
    return min(size << min(max(num_patterns - 1, 0), 60), CAP)
