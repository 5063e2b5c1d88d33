"""GgufTokenizer: the tokenizer of a GGUF file, through llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from lowtide.models.errors import ModelError
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.tokenizer import Tokenizer

PIECE_BYTES = 256
NULL_TOKEN = -1


class GgufTokenizer(Tokenizer):
    """Encodes and decodes with the vocabulary of a loaded llama.cpp model."""

    def __init__(self, library: LlamaLibrary, vocabulary: Any) -> None:
        self._api = library.api
        self._vocabulary = vocabulary
        self._num_tokens = int(self._api.llama_vocab_n_tokens(vocabulary))
        self._buffer = ctypes.create_string_buffer(PIECE_BYTES)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; see `Tokenizer.encode`."""
        data = text.encode("utf-8", errors="replace")
        # A vocabulary without words spells a space with three bytes: llama.cpp then needs more room.
        for capacity in (len(data) + 8, 4 * len(data) + 8):
            token_ids = (ctypes.c_int32 * capacity)()
            count = self._api.llama_tokenize(
                self._vocabulary, data, len(data), token_ids, capacity, add_special, parse_special
            )
            if count >= 0:
                return list(token_ids[:count])
        raise ModelError(f"llama.cpp cannot tokenise a text of {len(data)} bytes: shorten it")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; control tokens have none."""
        return self._piece(token_id, special=False)

    def is_end(self, token_id: int) -> bool:
        """Whether the vocabulary marks the token as an end of generation."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token_id))

    @property
    def special_texts(self) -> dict[str, str]:
        """The texts of BOS and EOS, "" where there is none."""
        return {
            "bos_token": self._text(self._api.llama_vocab_bos(self._vocabulary)),
            "eos_token": self._text(self._api.llama_vocab_eos(self._vocabulary)),
        }

    def _text(self, token_id: int) -> str:
        if token_id == NULL_TOKEN:
            return ""
        return self._piece(token_id, special=True).decode("utf-8", errors="replace")

    def _piece(self, token_id: int, special: bool) -> bytes:
        if not 0 <= token_id < self._num_tokens:
            raise ModelError(
                f"token {token_id} is not in the vocabulary: ids from 0 to {self._num_tokens - 1} "
                "are allowed"
            )
        length = self._convert(token_id, special)
        if length < 0:
            self._buffer = ctypes.create_string_buffer(-length)
            length = self._convert(token_id, special)
        return self._buffer.raw[:length]

    def _convert(self, token_id: int, special: bool) -> int:
        size = len(self._buffer)
        return int(
            self._api.llama_token_to_piece(
                self._vocabulary, token_id, self._buffer, size, 0, special
            )
        )
