"""TokenVocabulary: the bytes of every token of a model, as constraints need them, from any tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from operator import sub
from typing import Any, TypeVar

from lowtide.models.text.tokenizer import Tokenizer

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
    def _table(self) -> tuple[bytes, array[int]]:
        """The bytes of all tokens one after the other, and where each token begins."""
        return self._tokenizer.pieces(self.num_tokens)

    @property
    def packed(self) -> tuple[bytes, array[int]]:
        """The bytes of all tokens one after the other, and where each token begins and the last one ends."""
        return self._table

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token; b"" for control tokens and unused ids, which no text contains."""
        text, starts = self._table
        return text[starts[token_id] : starts[token_id + 1]]

    def all_bytes(self) -> list[bytes]:
        """Return the bytes of each token, in the order of their ids."""
        text, starts = self._table
        return [text[start:end] for start, end in pairwise(starts)]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        _, starts = self._table
        return max(map(sub, starts[1:], starts), default=1)

    @cached_property
    def single_bytes(self) -> dict[int, int]:
        """For each byte that is a token of its own, the first such token."""
        text, starts = self._table
        found: dict[int, int] = {}
        for token_id, (start, end) in enumerate(pairwise(starts)):
            if end - start == 1:
                found.setdefault(text[start], token_id)
        return found

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

    def token_of(self, marker: str) -> int | None:
        """Return the one token that stands for a marker, a control token too; None where there is none."""
        found = self._tokenizer.encode(marker, add_special=False, parse_special=True)
        if len(found) != 1 or found[0] >= self.num_tokens or found[0] in self.end_ids:
            return None
        return found[0] if self.bytes_of(found[0]) in (b"", marker.encode()) else None

    def decode(self, token_ids: Sequence[int]) -> bytes:
        """Return the bytes of tokens."""
        return b"".join(map(self.bytes_of, token_ids))

    def clear(self) -> None:
        """Release the table and what constraints share; both are made again when they are needed."""
        self.__dict__.pop("_table", None)
        self._made.clear()
