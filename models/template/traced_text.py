"""TracedText: a string that knows which of its characters a message brought, through every string method.

A chat template mixes text of its own with the texts of messages. The tokenizer must know which is which, so that
a message cannot spell a control token. Each character has a byte in a mask, and every operation on the text does
the same to the mask. To a template, a `TracedText` is a `str`: it compares, hashes and sorts as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

from markupsafe import Markup, escape

from lowtide.models.text.prompt_span import PromptSpan

_TEMPLATE, _MESSAGE = b"\0", b"\1"
_RUNS = re.compile(rb"\x00+|\x01+")
MAX_MAPPED = 64 << 20
"""The most characters to read for the origins of a text whose length changes with its case; above it, all of the
text counts as the message's."""


class TracedText(str):
    """A text with a mask of one byte per character: 1 where a message brought it, 0 where the template did.

    Made by `from_message` and by the methods of another one. Results without a message's characters are plain
    strings.
    """

    __slots__ = ("_mask",)
    _mask: bytes

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return padded(self, spec) if spec else self

    def _like(self, text: str, mask: bytes) -> str:
        """Return a result of the same kind as this text."""
        return traced(text, mask)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = str.__getitem__(self, key)  # raises where the key is not an index
        mask = self._mask[key]
        return self._like(text, mask if isinstance(mask, bytes) else bytes((mask,)))

    def __iter__(self) -> Iterator[str]:
        for character, mark in zip(str.__iter__(self), self._mask, strict=True):
            yield self._like(character, bytes((mark,)))

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return self._like(str.__add__(self, other), self._mask + mask_of(other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return self._like(str.__add__(other, self), mask_of(other) + self._mask)

    def __mul__(self, times: SupportsIndex) -> str:
        return self._like(str.__mul__(self, times), self._mask * times.__index__())

    __rmul__ = __mul__

    def join(self, parts: Iterable[str], /) -> str:
        """Join the parts with this text between them."""
        texts = list(parts)
        return self._like(str.join(plain(self), texts), self._mask.join(map(mask_of, texts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """Replace `old`, whoever wrote it, by `new`, which brings its own marks."""
        text = str.replace(self, old, new, count)
        most = count.__index__()
        if old:
            pieces = str.split(self, old, most)
            masks = _sliced(self._mask, map(len, pieces), len(old))
            return self._like(text, mask_of(new).join(masks))
        times = len(self) + 1 if most < 0 else min(most, len(self) + 1)
        split_at = min(times, len(self))
        head = b"".join(mask_of(new) + self._mask[i : i + 1] for i in range(split_at))
        tail = mask_of(new) if times > len(self) else b""
        return self._like(text, head + self._mask[split_at:] + tail)

    def strip(self, chars: str | None = None, /) -> str:
        """Remove the characters at both ends."""
        start = len(self) - len(str.lstrip(self, chars))
        return self[start : start + len(str.strip(self, chars))]

    def lstrip(self, chars: str | None = None, /) -> str:
        """Remove the characters at the beginning."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        """Remove the characters at the end."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> str:
        """Remove the prefix, if it is there."""
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        """Remove the suffix, if it is there."""
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split as `str.split` does."""
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split from the right, as `str.rsplit` does."""
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Split into lines."""
        whole = str.splitlines(self, True)
        starts = _starts(map(len, whole))
        lines = str.splitlines(self, keepends)
        return [self[start : start + len(line)] for start, line in zip(starts, lines, strict=False)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the first `sep`."""
        return self._in_three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the last `sep`."""
        return self._in_three(str.rpartition(self, sep))

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        """Pad on both sides."""
        text = str.center(self, width, fill)
        blanks = len(text) - len(self)
        left = blanks // 2 + (blanks & width.__index__() & 1)  # as CPython rounds
        return self._padded(text, left, fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        """Pad on the right."""
        return self._padded(str.ljust(self, width, fill), 0, fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        """Pad on the left."""
        text = str.rjust(self, width, fill)
        return self._padded(text, len(text) - len(self), fill)

    def zfill(self, width: SupportsIndex, /) -> str:
        """Pad with zeros behind the sign."""
        text = str.zfill(self, width)
        sign = 1 if str.startswith(self, ("+", "-")) else 0
        zeros = bytes(len(text) - len(self))
        return self._like(text, self._mask[:sign] + zeros + self._mask[sign:])

    def upper(self) -> str:
        """Return the text in upper case."""
        return self._mapped(str.upper)

    def lower(self) -> str:
        """Return the text in lower case."""
        return self._mapped(str.lower)

    def casefold(self) -> str:
        """Return the text for comparisons without case."""
        return self._mapped(str.casefold)

    def swapcase(self) -> str:
        """Exchange upper and lower case."""
        return self._mapped(str.swapcase)

    def title(self) -> str:
        """Begin each word in upper case."""
        return self._mapped(str.title)

    def capitalize(self) -> str:
        """Begin the text in upper case."""
        return self._mapped(str.capitalize)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        """Replace tabs by blanks."""
        return self._mapped(lambda text: str.expandtabs(text, tabsize))

    def translate(self, table: Any, /) -> str:
        """Map characters; what becomes of them belongs to the message."""
        return all_message(str.translate(self, table))

    def format(self, *args: Any, **kwargs: Any) -> str:
        """Format; a message that formats owns the whole result. The sandbox formats in its own way."""
        return all_message(str.format(plain(self), *args, **kwargs))

    def format_map(self, mapping: Any, /) -> str:
        """Format; a message that formats owns the whole result. The sandbox formats in its own way."""
        return all_message(str.format_map(plain(self), mapping))

    def __mod__(self, values: Any) -> str:
        """Format; a message that formats owns the whole result. The sandbox formats in its own way."""
        return all_message(str.__mod__(plain(self), values))

    def _mapped(self, change: Callable[[str], str]) -> str:
        """Return `change` of this text, a function that reads from left to right.

        A beginning of the text becomes as long as that beginning of the result.
        """
        text, own = change(plain(self)), plain(self)
        if len(text) == len(own):
            return self._like(text, self._mask)
        runs = list(_RUNS.finditer(self._mask))
        if len(runs) * len(own) > MAX_MAPPED:
            return all_message(text)
        ends = [len(change(own[: run.end()])) for run in runs[:-1]] + [len(text)]
        starts = [0, *ends]
        pieces = zip(runs, starts, ends, strict=False)
        return self._like(text, b"".join(run[0][:1] * (end - start) for run, start, end in pieces))

    def _padded(self, text: str, left: int, fill: str) -> str:
        mark = mask_of(fill)
        right = len(text) - len(self) - left
        return self._like(text, mark * left + self._mask + mark * right)

    def _in_three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:second], self[second:]

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """Return the parts of a split as slices; between two of them are only separators or blanks."""
        if sep is not None:
            starts = _starts(len(part) + len(sep) for part in parts)
            return [self[i : i + len(part)] for i, part in zip(starts, parts, strict=False)]
        position, slices = 0, []
        for part in parts:
            start = str.find(self, part, position)
            position = start + len(part)
            slices.append(self[start:position])
        return slices


class TracedMarkup(TracedText):
    """A text that counts as escaped HTML, as jinja2's `safe` makes it: what is added to it is escaped."""

    __slots__ = ()

    def __html__(self) -> str:
        return self

    def _like(self, text: str, mask: bytes) -> str:
        return traced_markup(text, mask)

    def format(self, *args: Any, **kwargs: Any) -> str:
        """Format, with arguments escaped; the whole result belongs to the message."""
        return all_message(Markup(plain(self)).format(*args, **kwargs))

    def format_map(self, mapping: Any, /) -> str:
        """Format, with arguments escaped; the whole result belongs to the message."""
        return all_message(Markup(plain(self)).format_map(mapping))

    def __mod__(self, values: Any) -> str:
        return all_message(Markup(plain(self)) % values)

    def unescape(self) -> str:
        """Return the text as it was before it was escaped; all of it belongs to the message."""
        return all_message(Markup(plain(self)).unescape())

    def striptags(self) -> str:
        """Unescape, and remove tags and needless blanks; the whole result belongs to the message."""
        return all_message(Markup(plain(self)).striptags())


def _escaping(name: str) -> Callable[..., Any]:
    method = getattr(TracedText, name)

    def escaped(self: TracedMarkup, *args: Any, **kwargs: Any) -> Any:
        return method(
            self,
            *map(_escaped_argument, args),
            **{key: _escaped_argument(value) for key, value in kwargs.items()},
        )

    escaped.__name__ = name
    escaped.__doc__ = method.__doc__
    return escaped


def _escaped_argument(value: Any) -> Any:
    if isinstance(value, str) or hasattr(value, "__html__"):
        return escape_text(value)
    return [escape_text(item) for item in value] if isinstance(value, (list, tuple)) else value


for _name in "__add__ __radd__ join replace center ljust rjust strip lstrip rstrip".split():
    setattr(TracedMarkup, _name, _escaping(_name))


def traced(text: str, mask: bytes) -> str:
    """Return the text with the mask, as a plain string where no message brought any of it."""
    if _MESSAGE not in mask:
        return plain(text)
    result = TracedText(plain(text))
    result._mask = mask
    return result


def traced_markup(text: str, mask: bytes) -> str:
    """Return the text with the mask as escaped HTML."""
    if _MESSAGE not in mask:
        return Markup(plain(text))
    result = TracedMarkup(plain(text))
    result._mask = mask
    return result


def all_message(text: str) -> str:
    """Return the text, all of it from a message."""
    make = traced_markup if hasattr(text, "__html__") else traced
    return make(text, _MESSAGE * len(text))


def as_traced(text: str) -> TracedText:
    """Return a text with the methods of `TracedText`, also where no message brought any of it."""
    if isinstance(text, TracedText):
        return text
    result = (TracedMarkup if hasattr(text, "__html__") else TracedText)(plain(text))
    result._mask = bytes(len(text))
    return result


def mark_safe(text: str) -> str:
    """Return the text as escaped HTML."""
    return traced_markup(text, mask_of(text))


def escape_text(value: Any) -> str:
    """Escape HTML, as `markupsafe.escape` does."""
    if not isinstance(value, TracedText) or isinstance(value, TracedMarkup):
        return value if isinstance(value, TracedMarkup) else escape(value)
    runs = [(escape(run_text), mark) for run_text, mark in runs_of(value)]
    text = "".join(map(plain, (text for text, _ in runs)))
    return traced_markup(text, b"".join(mark * len(text) for text, mark in runs))


def changed(text: str, change: Callable[[str], str]) -> str:
    """Return `change(text)`, for a function that reads from left to right and makes no text shorter."""
    return text._mapped(change) if isinstance(text, TracedText) else change(text)


def mask_of(text: str) -> bytes:
    """Return the mask of any string."""
    return text._mask if isinstance(text, TracedText) else bytes(len(text))


def plain(text: str) -> str:
    """Return the text as an exact `str`."""
    return str.__str__(text)


def concatenated(parts: Iterable[str]) -> str:
    """Return the texts one behind the other: what jinja2 does with what a macro or a block prints."""
    texts = list(parts)
    text = "".join(texts)
    if not any(isinstance(part, TracedText) for part in texts):
        return text
    return traced(text, b"".join(map(mask_of, texts)))


def spans_of(parts: Iterable[str]) -> list[PromptSpan]:
    """Return the spans of the concatenated texts; two neighbours are never of the same kind."""
    text = as_traced(concatenated(parts))
    return [PromptSpan(piece, mark == _MESSAGE) for piece, mark in runs_of(text)]


def padded(text: str, spec: str) -> str:
    """Return the text formatted by a format specification such as ">10.3"."""
    result = str.__format__(text, plain(spec))
    if isinstance(spec, TracedText):
        return all_message(result)
    if not isinstance(text, TracedText):
        return result
    parsed = _SPEC.fullmatch(spec)
    if parsed is None:
        return all_message(result)
    shown = text[: int(parsed["precision"])] if parsed["precision"] else text[:]
    blanks = len(result) - len(shown)
    left = {">": blanks, "^": blanks // 2}.get(parsed["align"] or "<", 0)
    return traced(result, bytes(left) + mask_of(shown) + bytes(blanks - left))


_SPEC = re.compile(r"(?:.?(?P<align>[<>^]))?0?\d*(?:\.(?P<precision>\d+))?s?", re.DOTALL)


def runs_of(text: TracedText) -> Iterator[tuple[str, bytes]]:
    """Yield the longest pieces with one mark, as plain strings."""
    own = plain(text)
    for run in _RUNS.finditer(text._mask):
        yield own[run.start() : run.end()], run[0][:1]


def _starts(lengths: Iterable[int]) -> Iterator[int]:
    position = 0
    for length in lengths:
        yield position
        position += length


def _sliced(mask: bytes, lengths: Iterable[int], gap: int) -> Iterator[bytes]:
    """Yield pieces of the mask of these lengths, with `gap` characters between two of them."""
    position = 0
    for length in lengths:
        yield mask[position : position + length]
        position += length + gap
