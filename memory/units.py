"""Sizes as people write them. Knows no machine: a percentage needs its whole from the caller."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}i"] = _FACTORS[f"{_letter}ib"] = 1 << (10 * _power)
    _FACTORS[f"{_letter}b"] = 1000**_power

_SIZE = re.compile(
    r"^\s*(?P<number>\d{1,18}(?:\.\d{1,6})?)\s*(?P<unit>[a-z]*|%)\s*$", re.IGNORECASE
)


def parse_size(text: str | int, whole_bytes: int | None = None) -> int:
    """Return the bytes that `text` means.

    "1GiB", "512MiB", "2G" (1024-based, as "2GiB"), "2GB" (1000-based), plain bytes, or "50%" of
    `whole_bytes`. Raises `BadSize` with an example where it is none of these, or not above zero.
    """
    from lowtide.memory.errors import BadSize

    match = _SIZE.match(str(text))
    if match is None:
        raise BadSize(f"{str(text)!r} is no size: write 512MiB, 2G, 50% or a number of bytes")
    number, unit = float(match["number"]), match["unit"].lower()
    if unit == "%":
        if whole_bytes is None or not 0 < number <= 100:
            raise BadSize(f"{str(text)!r} is no share of the memory: write 1% to 100%")
        return int(whole_bytes * number / 100)
    if unit not in _FACTORS:
        raise BadSize(f"{match['unit']!r} in {str(text)!r} is no unit: write KiB, MiB, GiB or TiB")
    size = (
        int(match["number"])
        if not unit and "." not in match["number"]
        else int(number * _FACTORS[unit])
    )
    if size <= 0:
        raise BadSize(f"{str(text)!r} is nothing: write a size above zero, such as 512MiB")
    return size


def format_bytes(num_bytes: int) -> str:
    """Return the size in the largest binary unit that leaves a number above one: "1.5 GiB"."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def format_bytes_up(num_bytes: int) -> str:
    """Return the size in whole MiB, rounded up: what can be typed back and is enough."""
    return f"{-(-num_bytes // MIB)} MiB"
