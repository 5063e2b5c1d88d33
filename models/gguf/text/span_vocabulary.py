"""GgufSpanVocabulary: what llama.cpp knows about the special tokens of a vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lowtide.models.errors import ModelError
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.text.span_encoder import BARRIERS, SpanVocabulary
from lowtide.models.text.special_tokens import SpecialToken, looks_like_marker

UNKNOWN, CONTROL, USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
LSTRIP, RSTRIP = 1 << 7, 1 << 8
"""Bits of llama_token_attr."""
PREFIXES_BLANKS = frozenset({1, 4})
"""The kinds of vocabularies (SentencePiece, unigrams) that may put a blank before a text."""

Encode = Callable[[bytes], list[int]]


class GgufSpanVocabulary(SpanVocabulary):
    """A vocabulary; `encode` tokenises text without control tokens, `piece` spells a token."""

    def __init__(
        self,
        library: LlamaLibrary,
        vocabulary: Any,
        encode: Encode,
        piece: Callable[[int], bytes],
    ) -> None:
        self._library, self._api, self._vocabulary = library, library.api, vocabulary
        self._encode, self._piece = encode, piece

    @functools.cached_property
    def special_tokens(self) -> Sequence[SpecialToken]:
        """The special tokens in llama.cpp's order: the longest first."""
        num_tokens = self._api.llama_vocab_n_tokens(self._vocabulary)
        found = self._library.tokens_with(
            self._vocabulary, num_tokens, CONTROL | USER_DEFINED | UNKNOWN
        )
        tokens = [self._special_token(token_id) for token_id in found]
        return sorted((t for t in tokens if t.text), key=lambda token: -len(token.text))

    def _special_token(self, token_id: int) -> SpecialToken:
        attribute = self._api.llama_vocab_get_attr(self._vocabulary, token_id)
        text = self._api.llama_vocab_get_text(self._vocabulary, token_id) or b""
        return SpecialToken(
            token_id,
            text,
            is_control=bool(attribute & (CONTROL | UNKNOWN)) or self._is_end(token_id),
            may_mark=looks_like_marker(text.decode("utf-8", errors="replace")),
            strips_left=bool(attribute & LSTRIP),
            strips_right=bool(attribute & RSTRIP),
        )

    @functools.cached_property
    def _unknown(self) -> set[int]:
        """Tokens that text without tokens of its own becomes: a message may have them."""
        attributes = self._api.llama_vocab_get_attr
        return {
            token.token_id
            for token in self.special_tokens
            if attributes(self._vocabulary, token.token_id) & UNKNOWN
        }

    @functools.cached_property
    def _control(self) -> set[int]:
        """Tokens that a message never has."""
        ids = {token.token_id for token in self.special_tokens if token.is_control}
        eos = self._api.llama_vocab_eos(self._vocabulary)
        return (ids | ({eos} if eos >= 0 else set())) - self._unknown

    def _is_end(self, token_id: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token_id))

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a control token or ends the answer."""
        return token_id in self._control or self._is_end(token_id)

    def encode_text(self, data: bytes, before: SpecialToken | None) -> list[int]:
        """Tokenise text; llama.cpp tokenises it alike at the start and behind any special token."""
        return self._encode(data)

    def encode_continued(self, data: bytes) -> list[int]:
        """Tokenise a text that follows another one: without the blank that a vocabulary puts before a text."""
        if self._api.llama_vocab_type(self._vocabulary) in PREFIXES_BLANKS:
            for barrier in map(str.encode, BARRIERS):
                try:
                    before, both = self._encode(barrier), self._encode(barrier + data)
                except ModelError:  # a vocabulary without a token for it
                    continue
                if both[: len(before)] == before:
                    return both[len(before) :]
        return self._encode(data)

    def made_of_text(self, token_id: int) -> bool:
        """Whether llama.cpp looks for the token in plain text, too."""
        return token_id in self._user_defined

    @functools.cached_property
    def _user_defined(self) -> set[int]:
        attributes = self._api.llama_vocab_get_attr
        return {
            token.token_id
            for token in self.special_tokens
            if attributes(self._vocabulary, token.token_id) & USER_DEFINED
        }

    def spellings(self, token_id: int) -> set[bytes]:
        """Return the texts that may become this token."""
        text = self._api.llama_vocab_get_text(self._vocabulary, token_id) or b""
        blank = text.replace("▁".encode(), b" ")
        return {text, blank, self._piece(token_id)} - {b""}
