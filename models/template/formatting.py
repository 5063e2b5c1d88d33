"""`%` and `str.format` with the origin of every character, and with bounds on widths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment
from jinja2.sandbox import SandboxedFormatter
from markupsafe import Markup

from lowtide.models.template.origin import holds_message
from lowtide.models.template.traced_text import (
    TracedText,
    all_message,
    concatenated,
    padded,
    plain,
)

Charge = Callable[[int], None]
TextOf = Callable[[Any], str]

_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<flags>[#0 +-]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d*))?[hlL]?(?P<kind>.)",
    re.DOTALL,
)


_SPELLS = re.compile(r"%(?:\([^()]*\))?[#0 +-]*(?:\*|\d+)?(?:\.(?:\*|\d*))?[hlL]?c")
"""Makes a character of a number, which may be a message's: numbers have no origin."""


def percent_format(pattern: str, values: Any, charge: Charge, text_of: TextOf) -> str:
    """Return `pattern % values`; `charge` counts characters before they are made."""
    sizes = [found["width"] for found in _CONVERSION.finditer(pattern)]
    sizes += [found["precision"] for found in _CONVERSION.finditer(pattern)]
    charge(len(pattern) + sum(_size_of(size, values) for size in sizes if size))
    if holds_message(pattern):
        return all_message(_native(pattern, values, text_of))
    native = _native(pattern, values, text_of)
    if not holds_message(values) and not _SPELLS.search(pattern):
        return native
    if isinstance(pattern, Markup):
        return all_message(native)
    result = concatenated(_converted(pattern, values, text_of))
    return result if plain(result) == native else all_message(native)


def _native(pattern: str, values: Any, text_of: TextOf) -> str:
    """Format as Python does, after what is printed was counted."""
    for value in values.values() if isinstance(values, Mapping) else _as_tuple(values):
        text_of(value)
    made = (Markup(plain(pattern)) if hasattr(pattern, "__html__") else plain(pattern)) % values
    return made if isinstance(made, Markup) else plain(made)


def _converted(pattern: str, values: Any, text_of: TextOf) -> Iterator[str]:
    """Yield the literal pieces of the pattern and the values between them."""
    remaining = iter(_as_tuple(values))
    position = 0
    for found in _CONVERSION.finditer(pattern):
        yield pattern[position : found.start()]
        position = found.end()
        if found["kind"] == "%":
            yield "%"
            continue
        width = _size(found["width"], remaining)
        precision = _size(found["precision"], remaining)
        value = values[found["key"]] if found["key"] is not None else next(remaining, "")
        yield _field(value, found["flags"], width, precision, found["kind"], text_of)
    yield pattern[position:]


def _size(stated: str | None, remaining: Iterator[Any]) -> int | None:
    if stated == "*":
        return int(next(remaining, 0))
    return None if stated is None else int(stated or 0)


def _field(
    value: Any, flags: str, width: int | None, precision: int | None, kind: str, text_of: TextOf
) -> str:
    """Return one converted value; `%s` of a text keeps the origin of each character."""
    if width is not None and width < 0:
        width, flags = -width, flags + "-"
    if kind != "s":
        spec = "%" + flags + ("" if width is None else str(width))
        spec += ("" if precision is None else f".{precision}") + kind
        made: str = spec % (value,)
        return all_message(plain(made)) if kind == "c" or holds_message(value) else made
    shown = text_of(value)
    shown = shown if precision is None else shown[:precision]
    blanks = " " * max((width or 0) - len(shown), 0)
    return concatenated((shown, blanks) if "-" in flags else (blanks, shown))


def _as_tuple(values: Any) -> Sequence[Any]:
    return values if isinstance(values, tuple) else (values,)


def _numbers(text: str) -> int:
    """Return the sum of all numbers that the text spells: no width in it is larger."""
    return sum(int(digits[:18]) for digits in re.findall(r"\d+", text))


def _size_of(stated: str, values: Any) -> int:
    """Return an upper bound of a width or precision."""
    if stated != "*":
        return int(stated[:18])
    numbers = (value for value in _as_tuple(values) if isinstance(value, int))
    return max((abs(number) for number in numbers), default=0)


class TracedFormatter(SandboxedFormatter):
    """`str.format` for templates: attributes are looked up in the sandbox."""

    def __init__(self, environment: Environment, charge: Charge, text_of: TextOf) -> None:
        super().__init__(environment)
        self._charge = charge
        self._text_of = text_of

    def made(self, pattern: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the formatted text."""
        self._charge(len(pattern))
        result = concatenated(self._pieces(plain(pattern), args, kwargs, iter_fields(), 2))
        if isinstance(pattern, TracedText):
            return all_message(plain(result))
        if isinstance(pattern, Markup):
            made = pattern.format(*args, **kwargs)
            return all_message(made) if isinstance(result, TracedText) else made
        return result

    def _pieces(
        self,
        pattern: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        fields: Callable[[str], str],
        depth: int,
    ) -> Iterator[str]:
        if depth == 0:
            raise ValueError("Max string recursion exceeded")
        for literal, name, spec, conversion in self.parse(pattern):
            yield literal
            if name is None:
                continue
            value, _ = self.get_field(fields(name), args, kwargs)
            if conversion:
                value = self._converted(value, conversion)
            inner = self._pieces(spec or "", args, kwargs, fields, depth - 1) if spec else ()
            yield self._shown(value, concatenated(inner))

    def _converted(self, value: Any, conversion: str) -> str:
        text = self._text_of(value)
        if conversion == "s":
            return text
        converted: str = self.convert_field(value, conversion)
        return all_message(plain(converted)) if holds_message(value) else converted

    def _shown(self, value: Any, spec: str) -> str:
        self._charge(_numbers(spec))
        if isinstance(value, str):
            return padded(value, spec)
        if not spec:
            return self._text_of(value)
        made = format(value, plain(spec))
        spells = spec.endswith("c")  # a character of a number, which may be a message's
        return all_message(made) if spells or holds_message((value, spec)) else made


def iter_fields() -> Callable[[str], str]:
    """Return a function that numbers the fields without a name, as `str.format` does."""
    used: set[bool] = set()
    count = iter(range(1 << 30))

    def name_of(field: str) -> str:
        head = re.split(r"[.\[]", field, maxsplit=1)[0]
        if head and not head.isdigit():
            return field
        used.add(head == "")
        if len(used) > 1:
            raise ValueError("cannot mix automatic and manual field numbering")
        return field if head else f"{next(count)}{field}"

    return name_of
