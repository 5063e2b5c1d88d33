"""OnnxTokenizer: the tokenizer.json of an ONNX folder, through the `tokenizers` library."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowtide.models.errors import BadModelFile, ModelError
from lowtide.models.onnx.config import onnx_library
from lowtide.models.onnx.span_vocabulary import OnnxSpanVocabulary
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.text.prompt_span import PromptSpan
from lowtide.models.text.span_encoder import SpanEncoder
from lowtide.models.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
BLANK = "▁"
"""How SentencePiece vocabularies write a space."""


class OnnxTokenizer(Tokenizer):
    """Encodes and decodes with a folder's tokenizer.json.

    Raises `BadModelFile` where it cannot be read or has more tokens than the model.
    """

    def __init__(self, spec: OnnxSpec) -> None:
        self._tokenizer = _loaded(spec.tokenizer_path)
        self._num_tokens = spec.vocabulary.num_tokens
        self._special_texts = dict(spec.special_texts)
        highest = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if highest > self._num_tokens:
            raise BadModelFile(
                f"{spec.tokenizer_path} has {highest} tokens, but the model has {self._num_tokens}: use the "
                "tokenizer that was exported with it"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {token_id for token_id, token in added.items() if token.special}
        self._plain = {i: token.content for i, token in added.items() if not token.special}
        self._end_ids = set(spec.end_ids)
        end = self._tokenizer.token_to_id(self._special_texts.get("eos_token", ""))
        if end is not None:
            self._end_ids.add(end)
        self._byte_of = _byte_alphabet() if _is_byte_level(self._tokenizer) else None

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; see `Tokenizer.encode`."""
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(_clean(text), add_special_tokens=add_special).ids)

    def encode_spans(
        self,
        spans: Sequence[PromptSpan],
        *,
        add_special: bool,
        continues: bool = False,
        template: str = "",
    ) -> list[int]:
        """Return the token ids of a prompt; see `Tokenizer.encode_spans`.

        The library's tokens of the whole text are taken where no message forges one.
        """
        spans = [PromptSpan(_clean(span.text), span.from_message) for span in spans]
        whole = None if continues else self._span_vocabulary.whole(spans, template=template)
        if whole is None:
            encoder = SpanEncoder(self._span_vocabulary)
            whole = encoder.encode(spans, continues=continues, template=template)
        return self.with_affixes(whole) if add_special else whole

    @functools.cached_property
    def _span_vocabulary(self) -> OnnxSpanVocabulary:
        return OnnxSpanVocabulary(self._tokenizer, self.is_end)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; control tokens and unused ids have none."""
        if not 0 <= token_id < self._num_tokens:
            raise ModelError(
                f"token {token_id} is not in the vocabulary: ids from 0 to {self._num_tokens - 1} "
                "are allowed"
            )
        if token_id in self._control:
            return b""
        if token_id in self._plain:
            return str(self._plain[token_id]).encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_of is not None:
            return b"".join(self._byte_of.get(letter, letter.encode()) for letter in piece)
        byte = _BYTE_TOKEN.match(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(BLANK, " ").encode()

    def is_end(self, token_id: int) -> bool:
        """Whether the folder's configuration names the token as an end of generation."""
        return token_id in self._end_ids

    @property
    def special_texts(self) -> dict[str, str]:
        """The texts of BOS and EOS for chat templates."""
        return dict(self._special_texts)


def _clean(text: str) -> str:
    """Replace halves of surrogate pairs, which UTF-8 has not."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _loaded(path: Path) -> Any:
    library = onnx_library("tokenizers")
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception class of its own
        raise BadModelFile(
            f"{path} cannot be read as a tokenizer ({error}): fetch it again"
        ) from None


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are written with one letter per byte."""
    decoder = tokenizer.decoder
    return decoder is not None and '"ByteLevel"' in json.dumps(
        json.loads(decoder.__getstate__().decode())
    )


def _byte_alphabet() -> dict[str, bytes]:
    """Return the byte that each letter stands for: printable ones themselves, the others from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
