"""Where a prompt's special tokens are: the partition of a text that llama.cpp does first, with spans.

llama.cpp looks for the special tokens of a vocabulary in the text, the longest first, and tokenises what lies between
them. Here a control token is one only where the chat template wrote every byte of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lowtide.models.text.prompt_span import PromptSpan

SPACES = b" \t\n\v\f\r"
"""What `isspace` takes for white space in C."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is looked for in the text.

    A `is_control` token comes from the template alone. So does another one that the template uses, where
    `may_mark` says that it looks like a marker ("<tool_call>", not a run of new lines). `strips_left` and
    `strips_right` take the white space beside it, too.
    """

    token_id: int
    text: bytes
    is_control: bool
    may_mark: bool = False
    strips_left: bool = False
    strips_right: bool = False


@dataclass(frozen=True, slots=True)
class TextPart:
    """The bytes from `start` to `end` of a prompt, which have no special token."""

    start: int
    end: int


Part: TypeAlias = SpecialToken | TextPart


class PromptBytes:
    """The text of a prompt in UTF-8, and which bytes of it came from messages."""

    def __init__(self, spans: Iterable[PromptSpan]) -> None:
        pieces: list[bytes] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        num_bytes = 0
        for span in spans:
            piece = span.text.encode("utf-8", errors="replace")
            if span.from_message:
                self._starts.append(num_bytes)
                self._ends.append(num_bytes + len(piece))
            pieces.append(piece)
            num_bytes += len(piece)
        self.data = b"".join(pieces)

    def touches_message(self, start: int, end: int) -> bool:
        """Whether a message wrote a byte from `start` to `end`, or an empty message lies inside."""
        first = bisect_right(self._ends, start)  # spans that end behind `start`
        return first < len(self._starts) and self._starts[first] < end


def split_at_special(
    prompt: PromptBytes, tokens: Iterable[SpecialToken], template: bytes = b""
) -> tuple[list[Part], set[int]]:
    """Return the special tokens of a prompt and the text between them, and the ids of the template's other markers.

    `tokens` are in the order in which they are looked for. `template` is the template's source.
    """
    parts: list[Part] = [TextPart(0, len(prompt.data))]
    markers: set[int] = set()
    for token in _present(prompt.data, tokens):
        is_marker = token.may_mark and not token.is_control and _marks(prompt, token, template)
        if is_marker:
            markers.add(token.token_id)
        is_control = token.is_control or is_marker
        parts = [
            small
            for part in parts
            for small in (
                _split(prompt, part, token, is_control) if isinstance(part, TextPart) else (part,)
            )
        ]
    return parts, markers


def looks_like_marker(text: str) -> bool:
    """Whether a token has letters and something that words have not, as "<tool_call>" and "[/INST]" do."""
    return any(map(str.isalpha, text)) and not all(c.isalnum() or c.isspace() for c in text)


def _present(data: bytes, tokens: Iterable[SpecialToken]) -> Iterator[SpecialToken]:
    """Yield the tokens that occur; two bytes rule most of them out."""
    pairs = {data[i : i + 2] for i in range(len(data))} | {bytes([byte]) for byte in set(data)}
    for token in tokens:
        if token.text[:2] in pairs and token.text in data:
            yield token


def _marks(prompt: PromptBytes, token: SpecialToken, template: bytes) -> bool:
    if token.text in template:
        return True
    whole = TextPart(0, len(prompt.data))
    return any(
        not prompt.touches_message(start, start + len(token.text))
        for start in _occurrences(prompt.data, token.text, whole)
    )


def _split(
    prompt: PromptBytes, part: TextPart, token: SpecialToken, is_control: bool
) -> Iterator[Part]:
    position = part.start
    for start in _occurrences(prompt.data, token.text, part):
        end = start + len(token.text)
        if start < position or (is_control and prompt.touches_message(start, end)):
            continue
        left_end = start
        if token.strips_left:
            while left_end > position and prompt.data[left_end - 1] in SPACES:
                left_end -= 1
        if left_end > position:
            yield TextPart(position, left_end)
        yield token
        position = end
        if token.strips_right:
            while position < part.end and prompt.data[position] in SPACES:
                position += 1
    if position < part.end:
        yield TextPart(position, part.end)


def _occurrences(data: bytes, text: bytes, part: TextPart) -> Iterator[int]:
    """Yield where `text` begins in the part, overlapping ones too."""
    start = data.find(text, part.start, part.end)
    while start >= 0:
        yield start
        start = data.find(text, start + 1, part.end)


def forged_places(prompt: PromptBytes, part: TextPart, spellings: Iterable[bytes]) -> list[int]:
    """Return where to cut a part so that no spelling that a message has a part in stays whole: behind its first byte.

    A cut never lies inside a character.
    """
    cuts = set()
    for spelling in spellings:
        for start in _occurrences(prompt.data, spelling, part):
            if prompt.touches_message(start, start + len(spelling)):
                cut = start + 1
                while cut < part.end and prompt.data[cut] & 0xC0 == 0x80:
                    cut += 1
                cuts.add(cut)
    return sorted(cuts)


def cut_at(part: TextPart, cuts: Sequence[int]) -> list[TextPart]:
    """Return the pieces of a part between cuts."""
    inside = cuts[bisect_right(cuts, part.start) : bisect_left(cuts, part.end)]
    ends = [*inside, part.end]
    return [TextPart(start, end) for start, end in zip([part.start, *inside], ends, strict=True)]
