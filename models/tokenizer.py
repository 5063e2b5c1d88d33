"""Tokenizer: text to token ids and back; and TextStream, which never prints half a character.

`models/gguf/tokenizer.py`, `models/onnx/tokenizer.py` and `models/fake_model.py` implement the interface.
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

        `add_special` adds what the model expects around a prompt (BOS, for most). `parse_special` turns
        control tokens written out in the text into tokens, which is meant for chat templates only.
        """

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


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
