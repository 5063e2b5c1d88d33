"""Pattern: the shortest text that completes a partly written match of a regular expression.

It only advises where to look for an end of an answer: whoever uses it asks the constraint whether the text is legal.
So it may read a pattern loosely: `{2,5}` is read as `{2,}`, and look-around, word borders and back references are
refused. Built as a nondeterministic automaton (Thompson, 1968), with the distance of each state to the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise

MAX_STATES = 20_000
MAX_DEPTH = 60
"""Most states of an automaton, and most groups inside each other: larger patterns get no advice."""
_PREFERRED = "0aA1xbc-_./: eETZ" + "".join(map(chr, range(33, 127)))
"""Characters that a class of characters is represented by, the best first."""
_Test = Callable[[str], bool]


class NoAdvice(Exception):
    """The pattern is too large, or not understood."""


class Pattern:
    """A regular expression as JSON Schema has it: it may match anywhere unless it has anchors.

    Raises `NoAdvice` for one that is not understood.
    """

    def __init__(self, source: str, *, anchored: bool = False) -> None:
        self._tests: list[tuple[_Test, str, int] | None] = []
        self._free: list[list[int]] = []
        reader = _Reader(source, self)
        start, end = reader.read()
        if not (anchored or reader.is_anchored):
            before, after = self.one(_any, "x")
            self.link(after, before)
            self.link(before, start)
            start = before
        self._start, self._end = start, end
        self._distance = self._distances()

    def state(self) -> int:
        """Add a state and return it."""
        if len(self._tests) >= MAX_STATES:
            raise NoAdvice
        self._tests.append(None)
        self._free.append([])
        return len(self._tests) - 1

    def link(self, first: int, second: int) -> None:
        """Let `second` follow `first` without a character."""
        self._free[first].append(second)

    def one(self, test: _Test, example: str) -> tuple[int, int]:
        """Add a character that `test` accepts; return the states before and behind it."""
        first, second = self.state(), self.state()
        self._tests[first] = (test, example, second)
        return first, second

    def _distances(self) -> list[float]:
        """Return how many characters each state is away from the end."""
        back: list[list[tuple[int, int]]] = [[] for _ in self._tests]
        for i, (test, free) in enumerate(zip(self._tests, self._free, strict=True)):
            if test is not None:
                back[test[2]].append((i, 1))
            for j in free:
                back[j].append((i, 0))
        distance = [float("inf")] * len(self._tests)
        distance[self._end] = 0
        waiting = deque([self._end])
        while waiting:
            state = waiting.popleft()
            for before, cost in back[state]:
                if distance[state] + cost < distance[before]:
                    distance[before] = distance[state] + cost
                    (waiting.append if cost else waiting.appendleft)(before)
        return distance

    def completion(self, text: str) -> str | None:
        """Return a shortest text that ends a match of `text`; None where `text` starts no match."""
        states = self._reached((self._start,))
        for character in text:
            following = [
                test[2]
                for test in map(self._tests.__getitem__, states)
                if test is not None and test[0](character)
            ]
            states = self._reached(following)
            if not states:
                return None
        state = min(states, key=self._distance.__getitem__)
        if self._distance[state] == float("inf"):
            return None
        found: list[str] = []
        while state != self._end:
            test = self._tests[state]
            if test is not None and self._distance[test[2]] + 1 == self._distance[state]:
                found.append(test[1])
                state = test[2]
            else:
                state = next(j for j in self._nearer(state))
        return "".join(found)

    def _nearer(self, state: int) -> Iterable[int]:
        """Yield a state on the way to the end that has no free link of the same distance back to `state`."""
        seen, waiting = {state}, deque(self._free[state])
        goal = self._distance[state]
        while waiting:
            other = waiting.popleft()
            if other in seen or self._distance[other] != goal:
                continue
            seen.add(other)
            test = self._tests[other]
            if other == self._end or (test is not None and self._distance[test[2]] + 1 == goal):
                yield other
            waiting.extend(self._free[other])

    def _reached(self, states: Iterable[int]) -> set[int]:
        """Return the states and those that follow them without a character."""
        found, waiting = set(states), list(states)
        while waiting:
            for other in self._free[waiting.pop()]:
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return found


class _Reader:
    """Reads a pattern into the states of an automaton."""

    def __init__(self, source: str, pattern: Pattern) -> None:
        self._source, self._at, self._depth = source, 0, 0
        self._pattern = pattern
        self.is_anchored = False

    def read(self) -> tuple[int, int]:
        """Return the first and the last state of the whole pattern."""
        found = self._alternatives()
        if self._at < len(self._source):
            raise NoAdvice
        return found

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._source):
            raise NoAdvice
        self._at += 1
        return self._source[self._at - 1]

    def _alternatives(self) -> tuple[int, int]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NoAdvice
        first, last = self._pattern.state(), self._pattern.state()
        while True:
            start, end = self._sequence()
            self._pattern.link(first, start)
            self._pattern.link(end, last)
            if self._peek() != "|":
                self._depth -= 1
                return first, last
            self._next()

    def _sequence(self) -> tuple[int, int]:
        first = last = self._pattern.state()
        while self._peek() not in ("", "|", ")"):
            if self._peek() in "^$":
                self.is_anchored |= self._next() == "^" and self._depth == 1
                continue
            start, end = self._repeated()
            self._pattern.link(last, start)
            last = end
        return first, last

    def _repeated(self) -> tuple[int, int]:
        begin = self._at
        start, end = self._atom()
        least, is_endless = self._counts()
        if least == 1 and not is_endless:
            return start, end
        behind = self._at
        copies = [(start, end)]
        for _ in range(max(least, 1) - 1 + (is_endless and least > 0)):
            self._at = begin
            copies.append(self._atom())
        self._at = behind
        for (_, before), (after, _) in pairwise(copies):
            self._pattern.link(before, after)
        first, last = self._pattern.state(), self._pattern.state()
        self._pattern.link(first, copies[0][0])
        self._pattern.link(copies[-1][1], last)
        if is_endless:
            self._pattern.link(copies[-1][1], copies[-1][0])
            self._pattern.link(copies[-2][1] if least else first, last)
        elif least == 0:
            self._pattern.link(first, last)
        return first, last

    def _counts(self) -> tuple[int, bool]:
        """Read `*`, `+`, `?` or `{m,n}`; return the least count, and whether more may follow."""
        symbol, least, more = self._peek(), 1, False
        if symbol and symbol in "*+?":
            self._next()
            least, more = int(symbol == "+"), symbol != "?"
        elif symbol == "{":
            end = self._source.find("}", self._at)
            low, comma, high = self._source[self._at + 1 : end].partition(",")
            if end > 0 and low.isdecimal() and (not high or high.isdecimal()):
                self._at = end + 1
                least, more = int(low[:6]), bool(comma) and high != low
        else:
            return least, more
        if self._peek() in ("?", "+"):
            self._next()
        return least, more

    def _atom(self) -> tuple[int, int]:
        symbol = self._next()
        if symbol == "(":
            if self._peek() == "?":
                self._skip_group_name()
            found = self._alternatives()
            if self._next() != ")":
                raise NoAdvice
            return found
        if symbol == "[":
            test = self._class()
        elif symbol == "\\":
            test = self._escape()
        elif symbol == ".":
            test = _any
        else:
            test = _exactly(symbol)
        return self._pattern.one(test, _example(test))

    def _skip_group_name(self) -> None:
        self._next()
        if self._peek() == ":":
            self._next()
            return
        rest = self._source[self._at :]
        if not rest.startswith(("P<", "<")) or rest[:2] in ("<=", "<!"):
            raise NoAdvice
        self._at = self._source.find(">", self._at) + 1
        if not self._at:
            raise NoAdvice

    def _escape(self) -> _Test:
        symbol = self._next()
        if symbol in _CLASSES:
            return _CLASSES[symbol]
        if symbol in "xu":
            size = 2 if symbol == "x" else 4
            digits = self._source[self._at : self._at + size]
            self._at += size
            try:
                return _exactly(chr(int(digits, 16)))
            except ValueError:
                raise NoAdvice from None
        if symbol.isalnum() and symbol not in _CONTROL:
            raise NoAdvice  # a word border, a back reference or a Unicode property
        return _exactly(_CONTROL.get(symbol, symbol))

    def _class(self) -> _Test:
        is_negated = self._peek() == "^"
        if is_negated:
            self._next()
        tests: list[_Test] = []
        while self._peek() != "]" or not tests:
            symbol = self._next()
            test = self._escape() if symbol == "\\" else _exactly(symbol)
            low = getattr(test, "character", None)
            if low and self._peek() == "-" and self._source[self._at + 1 : self._at + 2] != "]":
                self._next()
                symbol = self._next()
                other = self._escape() if symbol == "\\" else _exactly(symbol)
                high = getattr(other, "character", None)
                if high is None:
                    tests += [_exactly("-"), other]
                else:
                    test = _between(low, high)
            tests.append(test)
        self._next()

        def accepts(character: str) -> bool:
            return any(test(character) for test in tests) != is_negated

        return accepts


def _exactly(character: str) -> _Test:
    def accepts(other: str) -> bool:
        return other == character

    accepts.character = character  # type: ignore[attr-defined]
    return accepts


def _between(low: str, high: str) -> _Test:
    return lambda character: low <= character <= high


def _any(character: str) -> bool:
    return character != "\n"


def _is_word(character: str) -> bool:
    return character == "_" or (character.isascii() and character.isalnum())


_CLASSES: dict[str, _Test] = {
    "d": lambda c: "0" <= c <= "9",
    "D": lambda c: not "0" <= c <= "9",
    "w": _is_word,
    "W": lambda c: not _is_word(c),
    "s": lambda c: c.isspace(),
    "S": lambda c: not c.isspace(),
}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


def _example(test: _Test) -> str:
    """Return a character that the test accepts."""
    known = getattr(test, "character", None)
    if known:
        return str(known)
    for character in _PREFERRED:
        if test(character):
            return character
    for number in (*range(32), *range(127, 0x3000)):
        if test(chr(number)):
            return chr(number)
    raise NoAdvice


@lru_cache(maxsize=256)
def pattern_of(source: str, *, anchored: bool = False) -> Pattern | None:
    """Return the pattern of a regular expression; None for one that is not understood."""
    try:
        return Pattern(source, anchored=anchored)
    except (NoAdvice, RecursionError):
        return None
