"""The rest of a match that `Pattern` proposes always completes one, as Python's `re` sees it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.structured.grammar.pattern import MAX_STATES, pattern_of

PIECES = st.recursive(
    st.sampled_from(["a", "b", r"\d", "[a-c]", "[^b]", r"\w", r"\.", "-", "."]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: f"({'|'.join(some)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{3,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(source=PIECES, written=st.text("ab0-.", max_size=6), is_anchored=st.booleans())
def test_a_completion_completes_a_match(source: str, written: str, is_anchored: bool) -> None:
    source = f"^(?:{source})$" if is_anchored else source
    pattern = pattern_of(source)
    assert pattern is not None
    rest = pattern.completion(written)
    if rest is not None:
        assert re.search(source, written + rest)
    if re.search(source, written):
        assert rest == ""


@pytest.mark.parametrize(
    ("source", "written", "rest"),
    [
        ("^[0-9]+-[0-9]+$", "12", "-0"),
        ("[a-f0-9]{4}-x", "zz12", "00-x"),
        ("^a{3,5}b$", "a", "aab"),
        ("^(?P<year>[0-9]{4})$", "20", "00"),
        (r"^\u0041\x42$", "", "AB"),
        ("^[]a]$", "", "a"),
        ("^[a-]+$", "-", ""),
        ("^x$", "y", None),
    ],
)
def test_completions(source: str, written: str, rest: str | None) -> None:
    pattern = pattern_of(source)
    assert pattern is not None and pattern.completion(written) == rest


@pytest.mark.parametrize(
    "source",
    ["(?=a)b", r"\bfoo", r"(a)\1", "(", "[", "a)", r"\p{L}", "(?<!a)b", "(" * 5000, "\\"],
)
def test_what_is_not_understood_gets_no_advice(source: str) -> None:
    assert pattern_of(source) is None


@pytest.mark.parametrize(
    "source", ["a{999999}", "((((a{99}){99}){99}){99}){99}", "(){999999}", "(a*)*" * 5000]
)
def test_hostile_patterns_take_no_time(source: str) -> None:
    started = time.process_time()
    pattern = pattern_of(source)
    assert time.process_time() - started < 5
    assert pattern is None or len(pattern._distance) <= MAX_STATES
