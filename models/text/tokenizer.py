"""Tokenizer: text to token ids and back; and TextStream, which never prints half a character.

`models/gguf/text/tokenizer.py`, `models/onnx/tokenizer.py` and `models/fake_model.py` implement the interface.
"""

from __future__ import annotations

import codecs
import functools
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from itertools import accumulate, groupby

from lowtide.models.text.prompt_span import PromptSpan, text_of

MAX_STACK_BYTES_PER_CHARACTER = 330
"""The most stack that any pre-tokenizer of llama.cpp takes for a character of a match (measured)."""
COMPARED_AT_ONCE = 256
"""Tokens that are compared in one step, which is faster than one by one."""
_STRETCH = re.compile(r"\S+|\s+")


class Tokenizer(ABC):
    """The vocabulary of one model."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`.

        `add_special` adds what the model expects around a prompt (BOS, for most). `parse_special` turns
        control tokens written out in the text into tokens, which is meant for chat templates only.
        """

    def encode_spans(
        self,
        spans: Sequence[PromptSpan],
        *,
        add_special: bool,
        continues: bool = False,
        template: str = "",
    ) -> list[int]:
        """Return the token ids of a prompt in which only the template's spans become control tokens.

        The rest is text, whatever it spells, and is tokenised as in the whole text. `add_special` adds what `encode`
        adds, but never a second BOS. `continues` says that the spans follow text whose tokens are known. `template`
        is the template's source: other tokens that it uses as markers are its alone, too.
        """
        token_ids: list[int] = []
        for from_message, same in groupby(spans, key=lambda span: span.from_message):
            text = text_of(same)
            token_ids += self.encode(text, add_special=False, parse_special=not from_message)
        return self.with_affixes(token_ids) if add_special else token_ids

    def with_affixes(self, token_ids: list[int]) -> list[int]:
        """Return the tokens between what `add_special` adds; a BOS that is there already is not doubled."""
        first, last = self._affixes
        return [*([] if token_ids[: len(first)] == first else first), *token_ids, *last]

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        plain = self.encode("a", add_special=False, parse_special=False)
        added = self.encode("a", add_special=True, parse_special=False)
        num_first = next(
            (i for i in range(len(added)) if added[i : i + len(plain)] == plain), len(added)
        )
        return added[:num_first], added[num_first + len(plain) :]

    def stack_bytes(self, text: str) -> int:
        """Return about how much stack native code touches to tokenise `text`; 0 where it does not recurse."""
        return 0

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token, possibly a part of a character; b"" for control tokens."""

    def pieces(self, num_tokens: int) -> tuple[bytes, array[int]]:
        """Return the bytes of the first `num_tokens` tokens one after the other, and where each begins and ends.

        Token `i` is from `starts[i]` to `starts[i + 1]`.
        """
        found = list(map(self.token_bytes, range(num_tokens)))
        return b"".join(found), array("I", accumulate(map(len, found), initial=0))

    @abstractmethod
    def is_end(self, token_id: int) -> bool:
        """Whether the token ends an answer."""

    @property
    @abstractmethod
    def special_texts(self) -> dict[str, str]:
        """The texts of "bos_token" and "eos_token", for chat templates."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; an incomplete character becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")


class TextStream:
    """Turns a stream of tokens into text; a character split over tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def longest_stretch(text: str) -> int:
    """Return the length of the longest run of white space, or of anything else, in characters."""
    return max((len(match[0]) for match in _STRETCH.finditer(text)), default=0)


def longest_line(text: str) -> int:
    """Return the length of the longest line in characters."""
    return max(map(len, text.split("\n")))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    length = min(len(left), len(right))
    for start in range(0, length, COMPARED_AT_ONCE):
        end = min(start + COMPARED_AT_ONCE, length)
        if list(left[start:end]) != list(right[start:end]):
            return next(i for i in range(start, end) if left[i] != right[i])
    return length
