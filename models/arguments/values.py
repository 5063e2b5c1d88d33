"""Checks values that a caller passed, and converts those whose meaning is plain.

A number may be of any type that converts without loss: numpy's and torch's scalars, `Decimal`, 512.0 where a whole
number is meant, the text "512". A bool is not a number, and what is not finite is none either. Each function raises
`BadOption` in one sentence: what the value is, and what it must be. `name` is the option as `option` writes it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from lowtide.models.errors import BadOption

MOST = (1 << 31) - 1
"""Counts reach native code as 32-bit integers."""
MOST_WORD = (1 << 63) - 1
"""More than there is of anything; what has no upper limit ends here."""
_SHOWN_CHARACTERS = 60


def shown(value: object) -> str:
    """Return the value as a message shows it: in one line, and not longer than a line."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception:  # a caller's own class, or a whole number with more digits than Python prints
        return f"a value of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def plain_name(text: str) -> str:
    """Return a name from a file in one line, not longer than a line, and with nothing that a terminal obeys."""
    name = text if text.isprintable() else ascii(text)[1:-1]
    return name if len(name) <= _SHOWN_CHARACTERS else f"{name[: _SHOWN_CHARACTERS - 1]}…"


def whole_number(
    name: str, value: Any, least: int = 0, most: float = MOST, alternative: str = ""
) -> int:
    """Return the value as an `int` between `least` and `most`; `alternative` ends the error's sentence."""
    whole = as_whole(value)
    if whole is None:
        raise BadOption(f"{name} is {shown(value)}; it must be a whole number{alternative}")
    if not least <= whole <= most:
        is_beyond_all = whole > most == MOST
        allowed = f"at most {most:,}" if is_beyond_all else _range(least, most)
        raise BadOption(f"{name} is {shown(whole)}; it must be {allowed}{alternative}")
    return whole if most < math.inf else min(whole, MOST_WORD)


def number(name: str, value: Any, least: float, most: float) -> float:
    """Return the value as a `float` between `least` and `most`; a whole number stays an `int`."""
    found = as_whole(value)
    real = found if found is not None else _as_real(value)
    if real is None:
        raise BadOption(f"{name} is {shown(value)}; it must be a number")
    if not least <= real <= most:
        raise BadOption(f"{name} is {shown(value)}; it must be {_range(least, most)}")
    return real


def flag(name: str, value: Any) -> bool:
    """Return the value as a `bool`; 0 and 1 are accepted."""
    if _is_bool(value):
        return bool(value)
    found = as_whole(value) if not isinstance(value, str) else None
    if found not in (0, 1):
        raise BadOption(f"{name} is {shown(value)}; it must be True or False")
    return bool(found)


def text(name: str, value: Any, what: str = "a text") -> str:
    """Return the value if it is a string; `what` completes "it must be"."""
    if not isinstance(value, str):
        raise BadOption(f"{name} is {shown(value)}; it must be {what}")
    return str(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the value if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        last = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
        raise BadOption(f"{name} is {shown(value)}; it must be {last}")
    return str(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a text, a list of texts, or None for none, as a tuple; an empty text is refused."""
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else _as_list(value)
    if items is None:
        raise BadOption(f"{name} is {shown(value)}; it must be a text or a list of texts")
    for item in items:
        if not isinstance(item, str) or not item:
            raise BadOption(
                f"{name} has {shown(item)}; each of its texts must have at least one character"
            )
    return tuple(map(str, items))


def _as_list(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, bytes | bytearray | memoryview | dict) or not isinstance(value, Iterable):
        return None
    try:
        return tuple(value)
    except Exception:  # a caller's own iterator
        return None


def _is_bool(value: Any) -> bool:
    """Whether it is a bool, or numpy's or torch's."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return (
        isinstance(value, bool) or kind == "b" or str(getattr(value, "dtype", "")) == "torch.bool"
    )


def as_whole(value: Any) -> int | None:
    """Return the value as an `int`; None where that would lose something."""
    if _is_bool(value):
        return None
    try:
        return operator.index(value)
    except Exception:  # not an integer; it may be one by its value
        pass
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    real = _as_real(value)
    return int(real) if real is not None and real.is_integer() else None


def _as_real(value: Any) -> float | None:
    """Return the value as a finite `float`, or None."""
    if _is_bool(value) or isinstance(value, bytes | bytearray):
        return None
    try:
        real = float(value)
    except Exception:  # TypeError, ValueError, OverflowError, or what a caller's own class raises
        return None
    return real if math.isfinite(real) else None


def _range(least: float, most: float) -> str:
    return f"at least {least:g}" if most in (MOST, math.inf) else f"between {least:g} and {most:,g}"
