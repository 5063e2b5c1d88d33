"""Formulas of LTLf (De Giacomo and Vardi, IJCAI 2013): reading them, in negation normal form.

A trace is a list of actions, one a step. Atoms are actions: exactly one holds at each step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.models.errors import BadOption

MAX_CHARACTERS = 4096
MAX_DEPTH = 100
"""Deepest formula, in operators inside one another."""


@dataclass(frozen=True, slots=True)
class Formula:
    """An operator and what it is applied to; "is" and "is not" have the number of an action instead.

    "next" asks for another step, "weak next" only for what holds where there is one. "release" is the dual of
    "until".
    """

    operator: str
    parts: tuple[Formula, ...] = ()
    action: int = -1


TRUE, FALSE = Formula("true"), Formula("false")
GOES_ON = Formula("until", (TRUE, TRUE))
"""There is another step."""
HAS_ENDED = Formula("release", (FALSE, FALSE))
"""There is no other step."""
_DUAL = {
    "true": "false",
    "false": "true",
    "is": "is not",
    "is not": "is",
    "and": "or",
    "or": "and",
    "next": "weak next",
    "weak next": "next",
    "until": "release",
    "release": "until",
}
_BINARY = {"U": "until", "R": "release"}
_UNARY = ("!", "~", "not", "X", "N", "WX", "F", "G")
_WORDS = {*_UNARY, *_BINARY, "W", "and", "or", "true", "false"}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>"[^"]*"|'[^']*')
      | (?P<symbol><->|->|&&|\|\||[()!~&|])
      | (?P<name>[^\s()!~&|<>"'-]+(?:-[^\s()!~&|<>"'-]+)*)
    )""",
    re.VERBOSE,
)


def negated(formula: Formula) -> Formula:
    """Return the negation."""
    return Formula(_DUAL[formula.operator], tuple(map(negated, formula.parts)), formula.action)


def parse_formula(text: str, actions: Sequence[str]) -> Formula:
    """Return a formula over `actions`; raises `BadOption` where it cannot be read.

    Operators: ! & | -> <->, X (next), N (weak next), F (eventually), G (always), U (until), R (release), W (weak
    until). An action that is no plain name is quoted; `go(kitchen)` needs no quotes.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadOption(
            f"the formula has {len(text):,} characters, but at most {MAX_CHARACTERS:,} are read: shorten it"
        )
    return _Parser(text, actions).parse()


class _Parser:
    def __init__(self, text: str, actions: Sequence[str]) -> None:
        self._text = text
        self._number = {action: i for i, action in enumerate(actions)}
        self._depth = 0
        self._tokens = self._split()
        self._at = 0

    def _split(self) -> list[tuple[str, bool]]:
        """Return the tokens of the text, and whether each is an action."""
        found: list[tuple[str, bool]] = []
        at = 0
        while self._text[at:].strip():
            match = _TOKEN.match(self._text, at)
            if match is None:
                raise self._wrong(f"{self._text[at:].strip()[:20]!r} cannot be read")
            at = match.end()
            if match["quoted"]:
                found.append((match["quoted"][1:-1], True))
                continue
            token = match["symbol"] or match["name"]
            if match["name"] and token not in _WORDS:
                # go(kitchen) is an action where it is one of those that were stated.
                call = re.compile(r"\([^()]*\)").match(self._text, at)
                if call and token + call[0] in self._number:
                    token, at = token + call[0], call.end()
                found.append((token, True))
            else:
                found.append((token, token in self._number and token not in _WORDS))
        return found

    def _wrong(self, reason: str) -> BadOption:
        shown = self._text if len(self._text) <= 80 else self._text[:77] + "..."
        return BadOption(f"the formula {shown!r} is not valid: {reason}; correct it")

    def parse(self) -> Formula:
        found = self._equivalence()
        if self._at < len(self._tokens):
            raise self._wrong(f"{self._tokens[self._at][0]!r} follows its end")
        return found

    def _take(self, *operators: str) -> str | None:
        """Return the next token and go behind it where it is one of the operators."""
        if self._at < len(self._tokens):
            token, is_action = self._tokens[self._at]
            if not is_action and token in operators:
                self._at += 1
                return token
        return None

    def _equivalence(self) -> Formula:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(f"it is deeper than {MAX_DEPTH} operators")
        found = self._implication()
        while self._take("<->"):
            other = self._implication()
            both = Formula("and", (found, other))
            found = Formula("or", (both, Formula("and", (negated(found), negated(other)))))
        self._depth -= 1
        return found

    def _implication(self) -> Formula:
        parts = [self._or()]
        while self._take("->"):
            parts.append(self._or())
        found = parts.pop()
        while parts:
            found = Formula("or", (negated(parts.pop()), found))
        return found

    def _or(self) -> Formula:
        parts = [self._and()]
        while self._take("|", "||", "or"):
            parts.append(self._and())
        return Formula("or", tuple(parts)) if len(parts) > 1 else parts[0]

    def _and(self) -> Formula:
        parts = [self._until()]
        while self._take("&", "&&", "and"):
            parts.append(self._until())
        return Formula("and", tuple(parts)) if len(parts) > 1 else parts[0]

    def _until(self) -> Formula:
        parts, operators = [self._unary()], list[str]()
        while operator := self._take("U", "R", "W"):
            operators.append(operator)
            parts.append(self._unary())
        found = parts.pop()
        while parts:
            left, operator = parts.pop(), operators.pop()
            if operator == "W":
                found = Formula("release", (found, Formula("or", (left, found))))
            else:
                found = Formula(_BINARY[operator], (left, found))
        return found

    def _unary(self) -> Formula:
        operators = list[str]()
        while operator := self._take(*_UNARY):
            operators.append(operator)
            if len(operators) > MAX_DEPTH:
                raise self._wrong(f"it is deeper than {MAX_DEPTH} operators")
        found = self._atom()
        for operator in reversed(operators):
            if operator in ("!", "~", "not"):
                found = negated(found)
            elif operator == "F":
                found = Formula("until", (TRUE, found))
            elif operator == "G":
                found = Formula("release", (FALSE, found))
            else:
                found = Formula("next" if operator == "X" else "weak next", (found,))
        return found

    def _atom(self) -> Formula:
        if self._take("("):
            found = self._equivalence()
            if not self._take(")"):
                raise self._wrong("a bracket is not closed")
            return found
        if self._take("true"):
            return TRUE
        if self._take("false"):
            return FALSE
        if self._at == len(self._tokens):
            raise self._wrong("it ends where an action should come")
        token, is_action = self._tokens[self._at]
        if not is_action:
            raise self._wrong(f"{token!r} comes where an action should")
        if token not in self._number:
            known = ", ".join(list(self._number)[:6]) + (", ..." if len(self._number) > 6 else "")
            raise self._wrong(f"{token!r} is no action; the actions are {known}")
        self._at += 1
        return Formula("is", action=self._number[token])
