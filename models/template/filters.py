"""The filters of jinja2 that make text, with the origin of every character; and which filters keep it by themselves.

A filter that is in none of the lists here is jinja2's own: where a message brought any of its arguments, the text
that it returns counts as the message's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.filters
from jinja2.filters import FILTERS as OWN
from markupsafe import Markup

from lowtide.models.template.allowance import Allowance
from lowtide.models.template.formatting import percent_format
from lowtide.models.template.traced_text import (
    TracedText,
    as_traced,
    changed,
    concatenated,
    escape_text,
    mark_safe,
    plain,
)

PASSING = frozenset(
    "abs attr batch count d default dictsort first float groupby int items last length list map max min random "
    "reject rejectattr reverse round select selectattr slice sort sum unique wordcount".split()
)
"""Filters that return their arguments' values, numbers, or containers of these."""
DEEP = frozenset(
    "dictsort groupby join max min pprint sort string sum tojson unique xmlattr urlencode".split()
)
"""Filters that may read everything nested in their arguments."""
GROWING = frozenset({"batch", "slice"})
"""Filters that make as many items as a number says."""
REPEATING = frozenset({"urlize", "wordwrap"})
"""Filters that insert a text into another at many places."""


class TextFilters:
    """The filters that trace origins.

    `allowance` returns the current one, and `text_of` is `str` for a template's values.
    """

    def __init__(self, allowance: Callable[[], Allowance], text_of: Callable[[Any], str]) -> None:
        self._allowance = allowance
        self._text_of = text_of

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Return the filters as templates call them."""
        return {
            **{name: self._of_text(OWN[name]) for name in ("capitalize", "lower", "trim", "upper")},
            "center": self._center,
            "e": self._escape,
            "escape": self._escape,
            "forceescape": lambda value: escape_text(_without_markup(self._text_of(value))),
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "safe": lambda value: mark_safe(self._text_of(value)),
            "string": self._string,
            "title": lambda value: changed(self._text_of(value), jinja2.filters.do_title),
            "truncate": self._truncate,
        }

    def _charge(self, length: int) -> None:
        self._allowance().make(length)

    def _of_text(self, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda value, *args, **kwargs: own(self._text_of(value), *args, **kwargs)

    def _string(self, value: Any) -> str:
        return value if isinstance(value, str) else self._text_of(value)

    @jinja2.pass_environment
    def _truncate(self, env: jinja2.Environment, s: Any, *args: Any, **kwargs: Any) -> str:
        return jinja2.filters.do_truncate(env, self._text_of(s), *args, **kwargs)

    def _center(self, value: Any, width: int = 80) -> str:
        self._charge(width)
        return self._text_of(value).center(width)

    def _escape(self, value: Any) -> str:
        return escape_text(value if hasattr(value, "__html__") else self._text_of(value))

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TypeError("positional or keyword arguments, not both")
        return percent_format(self._string(value), kwargs or args, self._charge, self._text_of)

    @jinja2.pass_eval_context
    def _replace(self, context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        whole, old, new = self._text_of(s), self._text_of(old), self._text_of(new)
        if not context.autoescape:
            whole, old, new = map(_without_markup, (whole, old, new))
        return replaced(whole, old, new, -1 if count is None else count, self._charge)

    @jinja2.pass_eval_context
    def _join(self, context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        items = list(value)
        if attribute is not None:
            getter = jinja2.filters.make_attrgetter(context.environment, attribute)
            items = [getter(item) for item in items]
        if context.autoescape:
            return joined(escape_text(d), map(escape_text, items), self._allowance())
        glue = _without_markup(self._text_of(d))
        return joined(glue, map(self._text_of, items), self._allowance())

    def _indent(
        self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text: str = s
        self._charge(0 if isinstance(width, str) else width)
        indention: str = width if isinstance(width, str) else " " * width
        lines = (text + "\n").splitlines()
        self._charge(len(text) + len(indention) * len(lines))
        parts = [lines[0]]
        for line in lines[1:]:
            parts += ("\n", indention, line) if line or blank else ("\n", line)
        result = concatenated([indention, *parts] if first else parts)
        return mark_safe(result) if hasattr(text, "__html__") else result


def replaced(text: str, old: str, new: str, count: int, charge: Callable[[int], None]) -> str:
    """Return `text.replace(old, new, count)`, charged before it is made."""
    occurrences = text.count(old)
    times = occurrences if count < 0 else min(occurrences, count)
    charge(len(text) + times * len(new))
    if isinstance(new, TracedText):
        text = as_traced(text)
    return text.replace(old, new, count)


def joined(glue: str, parts: Iterable[str], allowance: Allowance) -> str:
    """Return `glue.join(parts)`, counted before it is made."""
    texts = list(parts)
    allowance.step(len(texts))
    characters = sum(len(text) for text in texts if isinstance(text, str))
    allowance.make(characters + len(glue) * max(len(texts) - 1, 0))
    if any(isinstance(text, TracedText) for text in texts):
        glue = as_traced(glue)
    return glue.join(texts)


def _without_markup(text: str) -> str:
    """Return the text as one that is not escaped HTML."""
    if isinstance(text, TracedText):
        return concatenated((text,))
    return plain(text) if isinstance(text, Markup) else text
