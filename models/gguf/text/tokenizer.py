"""GgufTokenizer: the tokenizer of a GGUF file, through llama.cpp."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from lowtide.models.errors import ModelError
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.gguf.text.span_vocabulary import GgufSpanVocabulary
from lowtide.models.gguf.text.text_cuts import TextCuts
from lowtide.models.text.prompt_span import PromptSpan
from lowtide.models.text.span_encoder import SpanEncoder
from lowtide.models.text.tokenizer import Tokenizer, longest_line, longest_stretch

PIECE_BYTES = 256
NULL_TOKEN = -1

PROBE_CHARACTERS = 2048
PROBES = ("A", "a", "1", " ", "\n", "-", "\u00e9", "\u4e2d", "\u0301", "\u200d")
"""One character of each kind that a pre-tokenizer may put into one word."""
PROBE_OF_WORDS = "tide "
PROBE_OF_LINES = "tide\n"
LITTLE_STACK_BYTES = 16
"""Stack for each character below which the pre-tokenizer does not recurse."""


class GgufTokenizer(Tokenizer):
    """Encodes and decodes with the vocabulary of a loaded llama.cpp model; `vocabulary` is its llama_vocab."""

    def __init__(self, library: LlamaLibrary, vocabulary: Any) -> None:
        self._library, self._api = library, library.api
        self._vocabulary = self.vocabulary = vocabulary
        self._num_tokens = int(self._api.llama_vocab_n_tokens(vocabulary))
        self._buffer = ctypes.create_string_buffer(PIECE_BYTES)

    def stack_bytes(self, text: str) -> int:
        """Return about how much stack llama.cpp touches to cut `text` into words.

        Whether this vocabulary's pre-tokenizer recurses is measured, once, when it is asked for first.
        """
        in_words, in_lines, in_text = self._stack_bytes_per_character
        return max(
            in_words * longest_stretch(text), in_lines * longest_line(text), in_text * len(text)
        )

    @functools.cached_property
    def _stack_bytes_per_character(self) -> tuple[int, int, int]:
        """The stack for each character of a word, of a line and of the text."""
        in_words = max(self._probe(character) for character in PROBES)
        return in_words, self._probe(PROBE_OF_WORDS), self._probe(PROBE_OF_LINES)

    def _probe(self, repeated: str) -> int:
        text = (repeated * PROBE_CHARACTERS)[:PROBE_CHARACTERS]
        touched = ctypes.c_size_t()
        self._call(text.encode(), add_special=False, parse_special=False, touched=touched)
        num_bytes = touched.value // PROBE_CHARACTERS
        return num_bytes if num_bytes >= LITTLE_STACK_BYTES else 0

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; see `Tokenizer.encode`."""
        data = text.encode("utf-8", errors="replace")
        if not add_special and not parse_special:
            return self._cuts.encode(data)
        return self._call(data, add_special=add_special, parse_special=parse_special)

    def encode_spans(
        self,
        spans: Sequence[PromptSpan],
        *,
        add_special: bool,
        continues: bool = False,
        template: str = "",
    ) -> list[int]:
        """Return the token ids of a prompt; see `Tokenizer.encode_spans`."""
        token_ids = self._span_encoder.encode(spans, continues=continues, template=template)
        return self.with_affixes(token_ids) if add_special else token_ids

    @functools.cached_property
    def _span_encoder(self) -> SpanEncoder:
        piece = functools.partial(self._piece, special=True)
        return SpanEncoder(
            GgufSpanVocabulary(self._library, self._vocabulary, self._cuts.encode, piece)
        )

    @functools.cached_property
    def _cuts(self) -> TextCuts:
        encode = functools.partial(self._call, add_special=False, parse_special=False)
        return TextCuts(self._api.llama_vocab_type(self._vocabulary), encode, self._texts)

    def _texts(self) -> Iterator[bytes]:
        """Yield the texts of all tokens, as the vocabulary writes them."""
        text_of = self._api.llama_vocab_get_text
        return (text_of(self._vocabulary, i) or b"" for i in range(self._num_tokens))

    def _call(
        self,
        data: bytes,
        *,
        add_special: bool,
        parse_special: bool,
        touched: ctypes.c_size_t | None = None,
    ) -> list[int]:
        # A vocabulary without words spells a space with three bytes: llama.cpp then needs more room.
        for capacity in (len(data) + 8, 4 * len(data) + 8):
            token_ids = (ctypes.c_int32 * capacity)()
            count = self._library.tokenize(
                self._vocabulary,
                data,
                token_ids,
                add_special=add_special,
                parse_special=parse_special,
                touched=touched,
            )
            if count >= 0:
                return list(token_ids[:count])
        raise ModelError(f"llama.cpp cannot tokenise a text of {len(data)} bytes: shorten it")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; control tokens have none."""
        return self._piece(token_id, special=False)

    def pieces(self, num_tokens: int) -> tuple[bytes, array[int]]:
        """Return the bytes of all tokens; see `Tokenizer.pieces`. One call, where `token_bytes` is one for each."""
        if num_tokens > self._num_tokens:
            return super().pieces(num_tokens)
        return self._library.token_pieces(self._vocabulary, num_tokens)

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
