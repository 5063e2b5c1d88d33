"""TokenVocabulary: the bytes of every token of a model, as constraints need them, from any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from lowtide.models.tokenizer import Tokenizer

Made = TypeVar("Made")


class TokenVocabulary:
    """The `num_tokens` tokens of a tokenizer. Their bytes are read once, when they are first used."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.num_tokens = num_tokens
        self._made: dict[Any, Any] = {}

    def cached(self, make: Callable[[TokenVocabulary], Made]) -> Made:
        """Return `make(self)`, which is called once: what all constraints of a model share."""
        if make not in self._made:
            self._made[make] = make(self)
        made: Made = self._made[make]
        return made

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token; b"" for control tokens and unused ids, which no text contains."""
        return tuple(map(self._tokenizer.token_bytes, range(self.num_tokens)))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(filter(self._tokenizer.is_end, range(self.num_tokens)))

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of a text inside an answer; [] where the tokenizer would change the text.

        Some tokenizers put a blank before every text.
        """
        try:
            token_ids = self._tokenizer.encode(
                text.decode("utf-8"), add_special=False, parse_special=False
            )
        except UnicodeDecodeError:
            return []
        return token_ids if self.decode(token_ids) == text else []

    def decode(self, token_ids: Sequence[int]) -> bytes:
        """Return the bytes of tokens."""
        return b"".join(map(self._tokenizer.token_bytes, token_ids))

    def release_bytes(self) -> None:
        """Release the table of bytes; it is read again when it is needed."""
        self.__dict__.pop("token_bytes", None)

    def clear(self) -> None:
        """Release the table and what constraints share; both are made again when they are needed."""
        self.release_bytes()
        self._made.clear()
