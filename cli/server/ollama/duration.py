"""Durations as ollama's clients write them: seconds, or texts such as "5m" and "1h30m"; below 0 is for ever."""

from __future__ import annotations

import math
import re
from typing import Any

_PART = r"(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"[+-]?(?:0|(?:{_PART})+)")
_MOST_CHARACTERS = 64


def is_duration(value: Any) -> bool:
    """Whether a value of JSON is a duration."""
    if isinstance(value, str):
        return len(value) <= _MOST_CHARACTERS and _DURATION.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_no_time(duration: Any) -> bool:
    """Whether a duration is 0."""
    if isinstance(duration, str):
        return not any(digit in duration for digit in "123456789")
    return bool(duration == 0)
