"""Parsing and formatting of sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.units import MIB, BadSize, format_bytes, format_bytes_up, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1GiB", 1 << 30),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("2G", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("64k", 64 << 10),
        ("1000000", 1000000),
        (1000000, 1000000),
        ("10b", 10),
        ("1Ti", 1 << 40),
        ("50%", 500),
        ("12.5%", 125),
        ("100%", 1000),
    ],
)
def test_valid_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text, whole_bytes=1000) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", "1e9", "0", "0MiB", "0%", "101%", "1XB", "1 2", "nan", "½GiB", "9" * 40],
)
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(BadSize) as caught:
        parse_size(text, whole_bytes=1000)
    assert caught.value.exit_code == 2


def test_a_percentage_needs_a_total() -> None:
    with pytest.raises(BadSize):
        parse_size("50%")


@given(st.integers(1, 1 << 50))
def test_plain_bytes_are_exact(number: int) -> None:
    assert parse_size(str(number)) == number


@given(st.integers(1, 1 << 50))
def test_a_printed_bound_is_enough_when_typed_back(number: int) -> None:
    typed = format_bytes_up(number).replace(" ", "")
    assert number <= parse_size(typed) < number + MIB


def test_formats() -> None:
    assert format_bytes(1536 << 20) == "1.5 GiB"
    assert format_bytes(400 << 20) == "400.0 MiB"
    assert format_bytes(2048) == "2.0 KiB"
    assert format_bytes(7) == "7 B"
