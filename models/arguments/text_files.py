"""Text as users store it: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs

from lowtide.models.errors import BadOption

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_EXAMINED_BYTES = 4096


def decoded(data: bytes, name: str, *, is_cut: bool = False) -> str:
    """Return the text without its byte order mark; `is_cut` allows half a character at the end.

    Raises `BadOption` with the encoding that it is in instead, or the position of the first wrong byte.
    """
    encoding = _other_encoding(data)
    if encoding is not None:
        raise BadOption(
            f"{name} is {encoding}, and must be UTF-8: convert it, for example with "
            f"iconv -f {encoding} -t UTF-8"
        )
    body = data.removeprefix(codecs.BOM_UTF8)
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        if is_cut and error.reason == "unexpected end of data" and error.end == len(body):
            return body.decode("utf-8", errors="ignore")
        position = error.start + len(data) - len(body)
        raise BadOption(
            f"{name} is not UTF-8 at byte {position}: convert it, for example with iconv"
        ) from None


def _other_encoding(data: bytes) -> str | None:
    """Return the encoding that the mark at the beginning names, or that the zero bytes of plain letters show."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    start = data[:_EXAMINED_BYTES]
    if len(start) >= 4 and max(start[::2].count(0), start[1::2].count(0)) > len(start) // 4:
        if min(start[::2].count(0), start[1::2].count(0)) > len(start) // 8:
            return "UTF-32"
        return "UTF-16"
    return None
