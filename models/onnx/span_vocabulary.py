"""OnnxSpanVocabulary: what the `tokenizers` library knows about the special tokens of a vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lowtide.models.text.prompt_span import PromptSpan, text_of
from lowtide.models.text.span_encoder import BARRIERS, SpanVocabulary
from lowtide.models.text.special_tokens import PromptBytes, SpecialToken, looks_like_marker


class OnnxSpanVocabulary(SpanVocabulary):
    """The vocabulary of a tokenizer.json; `is_end` says which tokens end an answer."""

    def __init__(self, tokenizer: Any, is_end: Callable[[int], bool]) -> None:
        self._tokenizer, self._is_end = tokenizer, is_end

    @functools.cached_property
    def special_tokens(self) -> Sequence[SpecialToken]:
        """The added tokens, the longest first."""
        tokens = [
            SpecialToken(
                token_id,
                added.content.encode(),
                is_control=bool(added.special) or self._is_end(token_id),
                may_mark=looks_like_marker(added.content),
                strips_left=bool(added.lstrip),
                strips_right=bool(added.rstrip),
            )
            for token_id, added in self._tokenizer.get_added_tokens_decoder().items()
        ]
        return sorted((t for t in tokens if t.text), key=lambda token: -len(token.text))

    @functools.cached_property
    def _control(self) -> set[int]:
        return {token.token_id for token in self.special_tokens if token.is_control}

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a special one or ends the answer."""
        return token_id in self._control or self._is_end(token_id)

    def spellings(self, token_id: int) -> set[bytes]:
        """Return the texts that may become this token."""
        piece = self._tokenizer.id_to_token(token_id) or ""
        decoded = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return {piece.encode(), piece.replace("▁", " ").encode(), decoded.encode()} - {b""}

    def encode_text(self, data: bytes, before: SpecialToken | None) -> list[int]:
        """Tokenise text behind a special token: some tokenizers put a blank before the first text alone."""
        if before is None:
            return self._encode(data.decode())
        behind = self._behind(before.text.decode(), data.decode())
        return self._encode(data.decode()) if behind is None else behind

    def encode_continued(self, data: bytes) -> list[int]:
        """Tokenise text behind other text."""
        text = data.decode()
        behind = (self._behind(barrier, text) for barrier in BARRIERS)
        return next((ids for ids in behind if ids is not None), None) or self._encode(text)

    def _behind(self, before: str, text: str) -> list[int] | None:
        """Return the tokens of `text` behind `before`; None where they have a token together."""
        first, both = self._encode(before), self._encode(before + text)
        return both[len(first) :] if both[: len(first)] == first else None

    def _encode(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def whole(self, spans: Sequence[PromptSpan], *, template: str) -> list[int] | None:
        """Return the library's own tokens of the whole text; None where a message forges one of them."""
        self._tokenizer.encode_special_tokens = False
        text = text_of(spans)
        found = self._tokenizer.encode(text, add_special_tokens=False)
        prompt = PromptBytes(spans)
        starts = _byte_offsets(text)
        template_text = "\0".join([template, *(s.text for s in spans if not s.from_message)])
        for token_id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if start == end or not self._is_templates(token_id, template_text):
                continue
            while start < end and text[start].isspace():
                start += 1
            while start < end and text[end - 1].isspace():
                end -= 1
            if prompt.touches_message(starts[start], starts[end]):
                return None
        return list(found.ids)

    def _is_templates(self, token_id: int, template_text: str) -> bool:
        """Whether messages must not have the token: a control token, or one that the template uses as a marker."""
        if self.is_control(token_id):
            return True
        marker = self._markers.get(token_id)
        return marker is not None and marker in template_text

    @functools.cached_property
    def _markers(self) -> dict[int, str]:
        return {
            token.token_id: token.text.decode() for token in self.special_tokens if token.may_mark
        }


def _byte_offsets(text: str) -> list[int]:
    """Return where each character begins in UTF-8, and where the text ends."""
    offsets, num_bytes = [], 0
    for character in text:
        offsets.append(num_bytes)
        num_bytes += len(character.encode())
    return [*offsets, num_bytes]
