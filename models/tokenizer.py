"""Tokenizer: text to token ids and back, and TextStream, which never prints half a character.

Knows no model: `gguf_tokenizer` and `fake_model` implement the interface.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Tokenizer(ABC):
    """The vocabulary of one model."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`.

        `add_special` adds what the model wants around a prompt (BOS, for most); `parse_special`
        reads control tokens written out in the text, which only a chat template may write.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token, perhaps a part of a character; b"" for control tokens."""

    @abstractmethod
    def is_end(self, token_id: int) -> bool:
        """Whether the token ends an answer."""

    @property
    @abstractmethod
    def special_texts(self) -> dict[str, str]:
        """The texts that chat templates ask for: "bos_token", "eos_token"."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole token ids; a broken character becomes U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")


class TextStream:
    """Turns tokens into text as they come: a character split over tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that became whole with this token."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common before they differ."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
