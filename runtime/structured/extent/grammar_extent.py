"""The extent of a grammar in Lark: the shortest text of its first rule, and the size of its terminals.

The shortest text is the least fixed point of the rules' equations (Knuth, 1977). Terminals, whose names are in
capitals, are written out where they are used, as the library does. The reader is loose: what it does not know counts as
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lowtide.runtime.structured.extent.bounds import check_bounds
from lowtide.runtime.structured.extent.bytes import RULE_BYTES, STATE_BYTES, TEXT_BYTES
from lowtide.runtime.structured.extent.extent import (
    CAP,
    NOTHING,
    UNKNOWN,
    Extent,
    Part,
    intersection,
    largest,
)
from lowtide.runtime.structured.extent.pattern_extent import number, pattern_extent
from lowtide.runtime.structured.extent.schema_extent import schema_extent

_RULE = re.compile(
    r"^[ \t]*[?!]?([A-Za-z_][\w-]*)[ \t]*(?:\[[^\]\n]*\])?[ \t]*(?:\.-?\d+)?[ \t]*:", re.MULTILINE
)
_DIRECTIVE = re.compile(r"^[ \t]*%(?:ignore|import|declare|llguidance)\b[^\n]*", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|->\s*\w+|%(?P<inline>\w+))|(?P<range>"(?:\\.|[^"\\\n])*"\s*\.\.\s*"(?:\\.|[^"\\\n])*")"""
    r"""|(?P<text>"(?:\\.|[^"\\\n])*"i?)|(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)"""
    r"""|(?P<count>\{\s*\d*\s*(?:,\s*\d*\s*)?\}|~\s*\d+(?:\.\.\d+)?)|(?P<name>[A-Za-z_][\w-]*)|(?P<special><[^>\n]*>)"""
    r"""|(?P<mark>[()\[\]|?*+&~])|(?P<other>.)""",
    re.DOTALL,
)
_SCHEMA = re.compile(r"%json\s*")
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[^}]*\}|.)")
MAX_ROUNDS = 100
"""Rounds over all rules in which the shortest texts must be found; else nothing is known of them."""


@dataclass(slots=True)
class _Level:
    """A group that is being read, as three levels: alternatives of intersections of sequences of items."""

    close: str
    is_negated: bool = False
    alternatives: list[_Node] = field(default_factory=list)
    intersected: list[_Node] = field(default_factory=list)
    sequence: list[_Node] = field(default_factory=list)

    def end_sequence(self) -> None:
        self.intersected.append(_Node("sequence", self.sequence))
        self.sequence = []

    def end_alternative(self) -> None:
        self.end_sequence()
        several = len(self.intersected) > 1
        self.alternatives.append(_Node("and", self.intersected) if several else self.intersected[0])
        self.intersected = []

    def whole(self) -> _Node:
        self.end_alternative()
        return _Node("or", self.alternatives)


@dataclass(slots=True)
class _Node:
    """A part of a rule: "sequence", "or", "and" or "not" of others, "repeat", "rule" by name, or "text"."""

    kind: str
    inside: list[_Node] = field(default_factory=list)
    name: str = ""
    least: int = 0
    size: int = 0
    num_bytes: int = 0


class _Unknown(Exception):
    """A rule has parts in a language that is not read here."""


def grammar_extent(source: str) -> Extent:
    """Return the extent of a grammar, whose first rule is `start`.

    Raises `BadOption` for a JSON schema inside it with bounds of numbers that cannot be kept.
    """
    for found in _SCHEMA.finditer(source):  # also where the rules around it are not read
        try:
            schema, _ = json.JSONDecoder().raw_decode(source, found.end())
        except (ValueError, RecursionError):  # the library reads no more of JSON than this does
            continue
        check_bounds(schema)
    try:
        return _extent_of(_rules(source))
    except (_Unknown, RecursionError):  # the library has limits of its own
        return UNKNOWN


def _extent_of(rules: Mapping[str, _Node]) -> Extent:
    least = _shortest(rules)
    expanded, known = [NOTHING], dict[str, int]()
    for name, node in rules.items():
        if name.isupper():
            expanded.append(Part(_terminal_size(name, rules, known, 0), f"terminal {name}"))
        else:
            expanded += [Part(one.size, f"rule {name}") for one in _texts(node)]
    shortest = least.get("start", 0)
    num_bytes = RULE_BYTES * len(rules)
    num_bytes += sum(TEXT_BYTES + one.num_bytes for node in rules.values() for one in _texts(node))
    widest = largest(*expanded)
    num_bytes += STATE_BYTES * widest.size
    return Extent(Part(shortest, "the rule start"), widest, min(num_bytes, CAP))


def _rules(source: str) -> dict[str, _Node]:
    source = _DIRECTIVE.sub("", source)
    starts = list(_RULE.finditer(source))
    ends = [*(one.start() for one in starts[1:]), len(source)]
    return {one[1]: _read(source[one.end() : end]) for one, end in zip(starts, ends, strict=False)}


def _read(body: str) -> _Node:
    """Return what is on the right of a rule's colon."""
    levels, at = [_Level("")], 0
    while found := _TOKEN.match(body, at):
        at, level, text = found.end(), levels[-1], found[0]
        if found["inline"]:
            at = _inline(found["inline"], body, at, level)
        elif found["range"]:
            _append(level, _Node("text", least=1, size=1))
        elif found["text"]:
            length = len(_ESCAPE.sub("x", text)) - 2 - text.endswith("i")
            _append(level, _Node("text", least=length, size=length))
        elif found["regex"]:
            least, size = pattern_extent(text[1 : text.rindex("/")])
            _append(level, _Node("text", least=least, size=size))
        elif found["count"]:
            digits = re.findall(r"\d+", text)
            least = 0 if re.match(r"\{\s*,", text) or not digits else number(digits[0])
            _repeat(level, least)
        elif found["name"]:
            _append(level, _Node("rule", name=text))
        elif found["mark"]:
            _mark(text, levels)
    while len(levels) > 1:
        _close(levels)
    return levels[0].whole()


def _inline(kind: str, body: str, at: int, level: _Level) -> int:
    """Read what is inside a rule in another language, such as `%json {...}`; return where it ends."""
    while at < len(body) and body[at].isspace():
        at += 1
    try:
        value, end = json.JSONDecoder().raw_decode(body, at)
    except ValueError:
        raise _Unknown from None
    inside = schema_extent(value) if kind == "json" else UNKNOWN
    least, size = inside.shortest.size, inside.expanded.size
    _append(level, _Node("text", least=least, size=size, num_bytes=inside.num_bytes))
    return end


def _append(level: _Level, node: _Node) -> None:
    """Add an item; what a text must not match asks for no text."""
    level.sequence.append(_Node("repeat", [node]) if level.is_negated else node)
    level.is_negated = False


def _mark(mark: str, levels: list[_Level]) -> None:
    level = levels[-1]
    if mark in "([":
        levels.append(_Level(")" if mark == "(" else "]"))
    elif mark in ")]":
        if len(levels) > 1:
            _close(levels)
    elif mark == "|":
        level.end_alternative()
    elif mark == "&":
        level.end_sequence()
    elif mark == "~":  # the next item must not match: it asks for no text
        level.is_negated = True
    elif mark in "?*":
        _repeat(level, 0)


def _close(levels: list[_Level]) -> None:
    level = levels.pop()
    _append(levels[-1], _Node("repeat", [level.whole()], least=int(level.close == ")")))


def _repeat(level: _Level, least: int) -> None:
    if level.sequence:
        level.sequence[-1] = _Node("repeat", [level.sequence[-1]], least=least)


def _shortest(rules: Mapping[str, _Node]) -> dict[str, int]:
    """Return the length of the shortest text of each rule; nothing where that is not found in time."""
    known = dict.fromkeys(rules, CAP)
    names = list(rules)
    for _ in range(MAX_ROUNDS):
        names.reverse()  # rules mostly use those below them, or those above
        changed = False
        for name in names:
            found = _least(rules[name], lambda other: known.get(other, 0))
            changed |= found != known[name]
            known[name] = found
        if not changed:
            return known
    return {}


def _least(node: _Node, of_rule: Callable[[str], int]) -> int:
    """Return the shortest text of a part of a rule."""
    if node.kind == "text":
        return node.least
    if node.kind == "rule":
        return of_rule(node.name)
    found = [_least(one, of_rule) for one in node.inside]
    if node.kind == "or":
        return min(found)
    if node.kind == "and":
        return max(found)
    return min(sum(found) * (node.least if node.kind == "repeat" else 1), CAP)


def _terminal_size(name: str, rules: Mapping[str, _Node], known: dict[str, int], depth: int) -> int:
    """Return the characters of a terminal with all that it uses written out."""
    if name not in rules or depth > MAX_ROUNDS:
        return 0
    if name not in known:
        known[name] = 0  # inside itself, it adds nothing
        known[name] = _size(
            rules[name], lambda other: _terminal_size(other, rules, known, depth + 1)
        )
    return known[name]


def _size(node: _Node, of_terminal: Callable[[str], int]) -> int:
    if node.kind == "text":
        return node.size
    if node.kind == "rule":
        return of_terminal(node.name)
    size = min(sum(_size(one, of_terminal) for one in node.inside), CAP)
    if node.kind == "and":
        return intersection(len(node.inside), size)
    return min(size * max(node.least, 1), CAP) if node.kind == "repeat" else size


def _texts(node: _Node) -> list[_Node]:
    if node.kind == "text":
        return [node]
    return [text for one in node.inside for text in _texts(one)]
