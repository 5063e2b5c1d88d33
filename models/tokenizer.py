"""Tokenizer: text to token ids and back; and TextStream, which never prints half a character.

`models/gguf/tokenizer.py`, `models/onnx/tokenizer.py` and `models/fake_model.py` implement the interface.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

MAX_STACK_BYTES_PER_CHARACTER = 330
"""The most stack that any pre-tokenizer of llama.cpp takes for a character of a match (measured)."""
_STRETCH = re.compile(r"\S+|\s+")


class Tokenizer(ABC):
    """The vocabulary of one model."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`.

        `add_special` adds what the model expects around a prompt (BOS, for most). `parse_special` turns
        control tokens written out in the text into tokens, which is meant for chat templates only.
        """

    def stack_bytes(self, text: str) -> int:
        """Return about how much stack native code touches to tokenise `text`; 0 where it does not recurse."""
        return 0

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token, possibly a part of a character; b"" for control tokens."""

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
    return next((i for i in range(length) if left[i] != right[i]), length)
