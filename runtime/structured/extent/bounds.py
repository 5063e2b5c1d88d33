"""Bounds of numbers in a JSON schema that the grammar library would change.

llguidance reads a bound as a 64-bit float, and makes it a whole number of 64 bits for integers: 2^53 + 1 becomes 2^53,
and 10^30 becomes 2^63 - 1. An answer inside the changed bound may be outside the stated one. At -2^63 its search for
a pattern does not end, and the process would. Between an exclusive bound and a fraction next to it, as in
`0 < x <= 0.5`, it accepts the exclusive bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.schema import escaped, map_schemas

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_LEAST_STEP, _STEP = 1e-15, 1e-12
"""How far from an exclusive bound of 0 an inclusive one is, and from others relative to them: llguidance rounds smaller
steps, and needs patterns of hundreds of digits for smaller numbers."""
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


def with_kept_bounds(schema: Any) -> Any:
    """Return a schema whose answers keep its exclusive bounds: those that would be lost become inclusive ones.

    Only a whole number is lost, and only next to a fraction. Bounds may meet through `allOf` and `$ref`, so all
    fractions of the schema count. In the form of draft 4, where `exclusiveMinimum` is true or false, they do as well.
    """
    bounds = list(_bounds_of(schema))
    fractions = {float(b) for _, b in bounds if _is_number(b) and not float(b).is_integer()}
    may_be_lost = fractions and any(keyword.startswith("exclusive") for keyword, _ in bounds)
    if not may_be_lost and not any(isinstance(bound, bool) for _, bound in bounds):
        return schema
    return map_schemas(schema, lambda node, _at: _kept(node, fractions))


def _bounds_of(schema: Any) -> Iterator[tuple[str, Any]]:
    waiting = deque([schema])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, Mapping):
            waiting += node.values()
            yield from ((keyword, node[keyword]) for keyword in _LOWER + _UPPER if keyword in node)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kept(node: dict[str, Any], fractions: set[float]) -> dict[str, Any]:
    """Return one schema, not those inside it, with bounds that are kept."""
    made = dict(node)
    for exclusive, inclusive, upward in (
        ("exclusiveMinimum", "minimum", True),
        ("exclusiveMaximum", "maximum", False),
    ):
        bound = made.get(exclusive)
        if isinstance(bound, bool) and (not bound or _is_number(made.get(inclusive))):
            del made[exclusive]
            if not bound:
                continue
            bound = made.pop(inclusive)
            made[exclusive] = bound
        if bound is None or not _is_number(bound):
            continue
        whole = float(bound)
        if whole.is_integer() and any(abs(fraction - whole) < 1 for fraction in fractions):
            del made[exclusive]
            nearest = _next(whole, upward=upward)
            stated = made.get(inclusive, nearest)
            made[inclusive] = max(nearest, stated) if upward else min(nearest, stated)
    return made


def _next(bound: float, *, upward: bool) -> float:
    """Return a number just above or below a bound."""
    step = _STEP * abs(bound) or _LEAST_STEP
    return bound + step if upward else bound - step
