"""TracedText does to its mask what each string method does to the text.

The messages' characters here never occur in the template's, in any case: so the characters of a result say what its
mask must be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.models.template.traced_text import (
    TracedText,
    all_message,
    as_traced,
    concatenated,
    escape_text,
    mask_of,
    padded,
    plain,
    spans_of,
)

TEMPLATE = "abAB<| \n_-1"
MESSAGE = "xyXYßﬃ\t>>é"
_CASES = (str, str.upper, str.lower, str.title, str.casefold)
_MESSAGES_ALL = {c for letter in MESSAGE for case in _CASES for c in case(letter)}

_own, _brought = (st.text(st.sampled_from(letters), max_size=4) for letters in (TEMPLATE, MESSAGE))
pieces = st.lists(st.tuples(st.booleans(), _own, _brought), max_size=4)


def text_from(parts: list[tuple[bool, str, str]]) -> str:
    return concatenated(
        all_message(message) if of_message else own for of_message, own, message in parts
    )


texts = pieces.map(text_from)


def check(result: Any, expected: Any) -> None:
    """Hold the result against that of plain strings, and its mask against its characters."""
    assert result == expected
    if isinstance(expected, (list, tuple)):
        for one, other in zip(result, expected, strict=True):
            check(one, other)
    elif isinstance(expected, str):
        assert list(mask_of(result)) == [int(c in _MESSAGES_ALL) for c in result]
        assert type(plain(result)) is str


METHODS = "upper lower casefold swapcase title capitalize split rsplit splitlines strip lstrip rstrip".split()


@given(texts)
def test_methods_without_arguments(text: str) -> None:
    for name in METHODS:
        check(getattr(text, name)(), getattr(plain(text), name)())
    check(list(text), list(plain(text)))
    check(list(reversed(text)), list(reversed(plain(text))))
    check(text.splitlines(True), plain(text).splitlines(True))
    check(str(text), plain(text))
    check(f"{text}", plain(text))


@given(texts, texts, st.integers(-1, 3))
def test_methods_with_a_text(text: str, other: str, count: int) -> None:
    own, plain_other = plain(text), plain(other)
    check(text + other, own + plain_other)
    check(other[:1] + text, plain_other[:1] + own)
    for name in ("removeprefix", "removesuffix", "strip", "lstrip", "rstrip"):
        check(getattr(text, name)(other), getattr(own, name)(plain_other))
    if other:
        check(text.split(other, count), own.split(plain_other, count))
        check(text.rsplit(other, count), own.rsplit(plain_other, count))
        check(text.partition(other), own.partition(plain_other))
        check(text.rpartition(other), own.rpartition(plain_other))
    check(text.split(None, count), own.split(None, count))
    check(text.rsplit(None, count), own.rsplit(None, count))
    check(as_traced(other).join([text, text, other]), plain_other.join([own, own, plain_other]))
    check(concatenated([text, other]), own + plain_other)


@given(texts, texts, texts, st.integers(-1, 4))
def test_replace(text: str, old: str, new: str, count: int) -> None:
    check(
        as_traced(text).replace(old, new, count), plain(text).replace(plain(old), plain(new), count)
    )
    for short in ("", "x", "a", "ab"):
        check(
            as_traced(text).replace(short, new, count),
            plain(text).replace(short, plain(new), count),
        )


@given(
    texts,
    st.integers(-3, 20),
    st.integers(-12, 12),
    st.integers(-12, 12),
    st.sampled_from([-2, -1, 1, 2]),
)
def test_numbers(text: str, width: int, start: int, stop: int, step: int) -> None:
    own = plain(text)
    for name in ("center", "ljust", "rjust"):
        check(getattr(text, name)(width), getattr(own, name)(width))
        check(getattr(text, name)(width, "_"), getattr(own, name)(width, "_"))
        if isinstance(text, TracedText):
            check(getattr(text, name)(width, all_message("x")), getattr(own, name)(width, "x"))
    check(text[start:stop:step], own[start:stop:step])
    check(text * (width // 4), own * (width // 4))
    if -len(own) <= start < len(own):
        check(text[start], own[start])
    for spec in (
        "",
        f">{abs(width)}",
        f"^{abs(width)}",
        f"_<{abs(width)}.3",
        f".{abs(width)}",
        "s",
    ):
        check(padded(text, spec), format(own, spec))
    if "0" not in own:
        assert text.zfill(width) == own.zfill(width)
        assert bytes(mask_of(text.zfill(width))).count(1) == mask_of(text).count(1)


@given(texts)
def test_escape_and_spans(text: str) -> None:
    assert plain(escape_text(text)) == plain(str(escape_text(plain(text))))
    spans = spans_of([text])
    assert "".join(span.text for span in spans) == text
    for before, after in pairwise(spans):
        assert before.from_message != after.from_message
    for span in spans:
        check(all_message(span.text) if span.from_message else span.text, span.text)


def test_no_method_of_strings_loses_the_origin() -> None:
    """Each public method of `str` that returns text is overridden, in Python versions to come, too."""
    text = all_message("Xy x")
    arguments: dict[str, tuple[Any, ...]] = {
        "center": (9,), "expandtabs": (), "format": (), "format_map": ({},), "join": (["a", "b"],), "ljust": (9,),
        "partition": (" ",), "removeprefix": ("X",), "removesuffix": ("x",), "replace": ("x", "z"), "rjust": (9,),
        "rpartition": (" ",), "translate": ({120: "q"},), "zfill": (9,), "count": ("x",), "endswith": ("x",),
        "find": ("x",), "index": ("x",), "rfind": ("x",), "rindex": ("x",), "startswith": ("x",),
    }  # fmt: skip
    for name in dir(str):
        if name.startswith("_") or name == "maketrans":
            continue
        result = getattr(text, name)(*arguments.get(name, ()))
        found = result if isinstance(result, (list, tuple)) else [result]
        assert all(isinstance(one, (TracedText, int, bytes)) for one in found if one != ""), name


@given(texts)
def test_it_is_a_string_to_a_template(text: str) -> None:
    assert hash(text) == hash(plain(text))
    assert {text: 1}[plain(text)] == {plain(text): 1}[text] == 1
    assert [
        key for key in dir(as_traced(text)) if key not in dir(str) and not key.startswith("_")
    ] == []
    with pytest.raises(TypeError):
        text["content"]  # type: ignore[index]
