"""The extent of a pattern is never more than its shortest match, and counts multiply without being written out."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.structured.extent.extent import CAP
from lowtide.runtime.structured.extent.pattern_extent import pattern_extent

PATTERNS = st.recursive(
    st.sampled_from(["a", "[bc]", r"\d", ".", "é", r"\.", "[^x]", r"[\]d]"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("(?:{})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{3,}", "{0}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(source=PATTERNS, data=st.data())
def test_no_match_is_shorter(source: str, data: st.DataObject) -> None:
    found = data.draw(st.from_regex(re.compile(source), fullmatch=True))
    assert pattern_extent(source).least <= len(found)


@given(source=st.text(alphabet=r"ab(|)[]{}*+?\^$.:=!<>P,1x2 ", max_size=40))
def test_any_text_has_an_extent(source: str) -> None:
    least, size = pattern_extent(source)
    assert 0 <= least <= CAP and 0 <= size <= CAP


@pytest.mark.parametrize(
    ("source", "least", "size"),
    [
        ("(((a{99}){99}){99}){99}", 99**4, 99**4),
        ("abc|d", 1, 4),
        (r"\d{4}-\d\d", 7, 7),
        ("(?i)a(?=bbb)c", 2, 5),
        ("a{3}?b", 4, 4),
        ("(?P<year>ab)+?", 2, 2),
        (r"\p{L}{2}[[:alpha:]]", 3, 3),
        ("x{" + "9" * 5000 + "}", CAP, CAP),
        ("(" * 50_000, 0, 0),
        ("a{", 2, 2),
    ],
)
def test_extents(source: str, least: int, size: int) -> None:
    assert pattern_extent(source) == (least, size)
