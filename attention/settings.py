"""Checks the fields of policies, which callers in Python set to values of any type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.models.arguments.paths import user_path
from lowtide.models.arguments.values import MOST, number, shown, whole_number
from lowtide.models.errors import BadOption

Ranges = Mapping[str, "tuple[int, int] | int"]
"""The least and the most of whole numbers, or the least alone, by the name of a field."""


def set_fields(policy: object, values: Mapping[str, Any]) -> None:
    """Set fields of a frozen dataclass, to the checked values."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)


def whole_fields(policy: Any, ranges: Ranges) -> dict[str, int | None]:
    """Return fields as whole numbers. None stays None where it is the default.

    Raises `BadOption` for a wrong value.
    """
    found: dict[str, int | None] = {}
    for name, limits in ranges.items():
        least, most = limits if isinstance(limits, tuple) else (limits, MOST)
        value = getattr(policy, name)
        may_be_none = type(policy).__dataclass_fields__[name].default is None
        found[name] = (
            None
            if value is None and may_be_none
            else whole_number(f"{policy.name}'s {name}", value, least, most)
        )
    return found


def number_of_keys(name: str, value: Any) -> int | float | None:
    """Return a k: a number of tokens, below 1 a share, or None. Raises `BadOption` for what is no number."""
    if value is None:
        return None
    return number(name, value, -MOST, MOST)


def file_field(name: str, value: Any) -> Path | None:
    """Return the path of a calibration file, or None."""
    return None if value is None else user_path(name, value)


def layers_field(name: str, value: Any) -> tuple[int, ...] | None:
    """Return layer numbers as a tuple, from any iterable of whole numbers, or None."""
    if value is None:
        return None
    try:
        items = None if isinstance(value, str | bytes) else tuple(value)
    except Exception:  # not iterable, or a caller's own iterator that fails
        items = None
    if items is None:
        raise BadOption(f"{name} are {shown(value)}; they must be a list of layer numbers")
    return tuple(whole_number(f"a layer of {name}", item, -MOST, MOST) for item in items)
