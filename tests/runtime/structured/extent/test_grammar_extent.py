"""The extent of a grammar: its shortest text, the size of its terminals, and no failure whatever it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.structured.extent.extent import CAP, MAX_SIZE
from lowtide.runtime.structured.extent.grammar_extent import grammar_extent


@pytest.mark.parametrize(
    ("source", "least"),
    [
        ('start: "a" "bc"', 3),
        ('start: a | b\na: "xyz" // the longer one\nb: "q"', 1),
        ('start: a~3\na: "x" b?\nb: "y"', 3),
        ('start: ("ab" | "c"){4} ["d"] "e"* "f"+', 5),
        ('start: start start | "a"', 1),
        ("start: /a{5}b/i", 6),
        ('start: "a".."z" "\\u00e9"', 2),
        ("start: T\nT: /(.|\\n)*/ & ~/(.|\\n)*abc(.|\\n)*/", 0),
        ('start: %json {"type": "string", "minLength": 7} "\\n"', 10),
        ('start: a a\na: b b\nb: c c\nc: "x"', 8),
        ('%ignore /\\s+/\nstart: "a"\n  | "bc" -> other', 1),
        ('start: "a" start', CAP),
        ("", 0),
    ],
)
def test_the_shortest_text(source: str, least: int) -> None:
    assert grammar_extent(source).shortest.size == least


def test_rules_that_double_each_other() -> None:
    rules = "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(30))
    assert grammar_extent(f'start: r0\n{rules}r30: "x"').shortest.size == 2**30


@pytest.mark.parametrize(
    "source",
    [
        'start: A\nA: B{1000}\nB: C{1000}\nC: "x"{1000}',
        "start: A\nA: " + " & ".join(f"/(.*x){{{i}}}.{{{i}}}/" for i in range(5, 35)),
        'start: %json {"type": "string", "pattern": "((a{99}){99}){999}"}',
    ],
)
def test_terminals_that_become_too_large(source: str) -> None:
    assert grammar_extent(source).expanded.size > MAX_SIZE


@given(source=st.text(alphabet='ABab:|"/()[]{}~&*+?%\\\n ,.13<>-', max_size=80))
def test_any_text_has_an_extent(source: str) -> None:
    found = grammar_extent(f"start: {source}")
    assert 0 <= found.shortest.size <= CAP and 0 <= found.expanded.size <= CAP


def test_groups_without_end() -> None:
    assert grammar_extent("start: " + "(" * 50_000).expanded.size == 0
