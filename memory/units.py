"""Sizes in bytes: parsing and formatting, and the errors about memory."""

from __future__ import annotations

import re
from typing import Any

from lowtide.models.arguments.values import as_whole, shown
from lowtide.models.errors import LowtideError

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


def checked_size(name: str, value: Any) -> str | int:
    """Return a size as `parse_size` reads it: a text, or a whole number of bytes of any type.

    `name` is the option as a message names it. Raises `BadSize` for anything else.
    """
    if isinstance(value, str):
        try:
            parse_size(value, whole_bytes=1 << 40)
        except BadSize as error:
            raise BadSize(f"{name} is {shown(value)}: {error}") from None
        return str(value)
    num_bytes = as_whole(value)
    if num_bytes is None or not 0 < num_bytes < 1 << 63:
        raise BadSize(
            f"{name} is {shown(value)}; it must be a size such as '512MiB' or '50%', or a number of bytes "
            "above 0"
        )
    return num_bytes


def parse_size(text: str | int, whole_bytes: int | None = None) -> int:
    """Return the number of bytes that `text` means.

    Accepts "1GiB", "512MiB", "2G" (1024-based, like "2GiB"), "2GB" (1000-based), plain bytes, or "50%" of
    `whole_bytes`. Raises `BadSize` for anything else and for sizes that are not above zero.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise BadSize(
            f"{shown(str(text))} is not a size: write 512MiB, 2G, 50% or a number of bytes"
        )
    number, unit = float(match["number"]), match["unit"].lower()
    if unit == "%":
        if whole_bytes is None or not 0 < number <= 100:
            raise BadSize(f"{str(text)!r} is not a share of the memory: write 1% to 100%")
        return int(whole_bytes * number / 100)
    if unit not in _FACTORS:
        raise BadSize(
            f"{match['unit']!r} in {str(text)!r} is not a unit: write KiB, MiB, GiB or TiB"
        )
    size = (
        int(match["number"])
        if not unit and "." not in match["number"]
        else int(number * _FACTORS[unit])
    )
    if size <= 0:
        raise BadSize(f"{str(text)!r} is too small: write a size above zero, such as 512MiB")
    return size


def format_bytes(num_bytes: int) -> str:
    """Return the size in the largest binary unit that it reaches, for example "1.5 GiB"."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def format_bytes_up(num_bytes: int) -> str:
    """Return the size in whole MiB, rounded up, so that a user can type it back as a limit."""
    return f"{-(-num_bytes // MIB)} MiB"


class BadSize(LowtideError):
    """A size that cannot be parsed."""

    exit_code = 2


class OverBudget(LowtideError):
    """The request does not fit into the budget; nothing was allocated.

    `needed_bytes` is the smallest budget that is enough, `budget_bytes` the budget, `hint` what to change.
    """

    exit_code = 2

    def __init__(self, what: str, needed_bytes: int, budget_bytes: int, hint: str) -> None:
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.hint = hint
        super().__init__(
            f"{what} needs at least {format_bytes_up(needed_bytes)}, but the limit is "
            f"{format_bytes(budget_bytes)}: {hint}"
        )


class NotEnforceable(LowtideError):
    """The kernel cannot enforce the budget on this system; nothing was loaded."""

    exit_code = 2


class KilledByLimit(LowtideError):
    """The kernel killed the process at its memory limit; unsaved data is lost."""
