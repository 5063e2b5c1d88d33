"""Bounds of numbers in a JSON schema that the grammar library would change.

llguidance reads a bound as a 64-bit float, and makes it a whole number of 64 bits for integers: 2^53 + 1 becomes 2^53,
and 10^30 becomes 2^63 - 1. An answer inside the changed bound may be outside the stated one. At -2^63 its search for
a pattern does not end, and the process would.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.schema import escaped

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")


def check_bounds(schema: Any) -> None:
    """Raise `BadOption` for a bound of a number that answers would not keep; one that becomes narrower is none.

    Values of `const`, `default` and the like are looked at, too: a `$ref` may use any of them as a schema.
    """
    waiting = deque([(schema, "")])
    while waiting:
        node, at = waiting.popleft()
        if isinstance(node, list):
            waiting += [(one, f"{at}/{i}") for i, one in enumerate(node)]
        if not isinstance(node, Mapping):
            continue
        for keyword, value in node.items():
            pointer = f"{at}/{escaped(str(keyword))}"
            if keyword in _LOWER + _UPPER and not _is_kept(value, keyword in _LOWER):
                raise BadOption(
                    f"the JSON schema cannot be enforced: {keyword} at {pointer} is {shown(value)}, which has more "
                    "digits than numbers of 64 bits; use one between -2^53 and 2^53, or leave it out"
                )
            waiting.append((value, pointer))


def _is_kept(value: Any, is_lower: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True  # no bound of a number
    try:
        read = float(value)
    except OverflowError:
        return False
    if not math.isfinite(read):
        return False
    if abs(read) < _MOST and read != int(read):
        return True  # a fraction is the same float here and there
    changed = min(max(int(read), _LEAST), _MOST)
    return changed != _LEAST and (changed >= value if is_lower else changed <= value)
