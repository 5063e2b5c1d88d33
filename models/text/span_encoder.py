"""SpanEncoder: the tokens of a prompt in which only the chat template writes control tokens.

Between two special tokens the text is one piece, where message and template meet, too: its blanks and merges are those
of the whole text. Where the tokenizer itself makes a control token of a message's text, the text is cut there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lowtide.models.text.prompt_span import PromptSpan
from lowtide.models.text.special_tokens import (
    PromptBytes,
    SpecialToken,
    TextPart,
    cut_at,
    forged_places,
    split_at_special,
)

BARRIERS = ("\x01", "\ue000", "\u0378", "\U000f0000")
"""Characters that hardly any token has: behind one of them no blank is added, and nothing merges over it."""


class SpanVocabulary(ABC):
    """What a vocabulary must answer for its prompts to be tokenised span by span."""

    @property
    @abstractmethod
    def special_tokens(self) -> Sequence[SpecialToken]:
        """The tokens to look for in a prompt, in this order."""

    @abstractmethod
    def is_control(self, token_id: int) -> bool:
        """Whether a message must never have the token."""

    def made_of_text(self, token_id: int) -> bool:
        """Whether the tokenizer makes the token wherever a text spells it: such a text is cut beforehand.

        llama.cpp's search for many of them in one text takes quadratic time.
        """
        return False

    @abstractmethod
    def spellings(self, token_id: int) -> set[bytes]:
        """Return the texts that may become this token."""

    @abstractmethod
    def encode_text(self, data: bytes, before: SpecialToken | None) -> list[int]:
        """Tokenise text behind a special token, or at the start."""

    @abstractmethod
    def encode_continued(self, data: bytes) -> list[int]:
        """Tokenise text behind other text: without the blank that a vocabulary may put before a text."""


class SpanEncoder:
    """Encodes spans with a vocabulary."""

    def __init__(self, vocabulary: SpanVocabulary) -> None:
        self._vocabulary = vocabulary

    def encode(
        self, spans: Sequence[PromptSpan], *, continues: bool = False, template: str = ""
    ) -> list[int]:
        """Return the tokens; see `Tokenizer.encode_spans`."""
        prompt = PromptBytes(spans)
        source = template.encode("utf-8", errors="replace")
        parts, markers = split_at_special(prompt, self._vocabulary.special_tokens, source)
        token_ids: list[int] = []
        before: SpecialToken | None = None
        for i, part in enumerate(parts):
            if isinstance(part, SpecialToken):
                token_ids.append(part.token_id)
                before = part
                continue
            text = _Text(self._vocabulary, prompt, part, before, continues and i == 0)
            token_ids += text.encode(markers)
        return token_ids


class _Text:
    """A part of a prompt without special tokens."""

    def __init__(
        self,
        vocabulary: SpanVocabulary,
        prompt: PromptBytes,
        part: TextPart,
        before: SpecialToken | None,
        continues: bool,
    ) -> None:
        self._vocabulary, self._prompt, self._part = vocabulary, prompt, part
        self._before, self._continues = before, continues

    def encode(self, markers: set[int]) -> list[int]:
        """Tokenise it; cut it where a message would forge a token, until none is left."""
        touched = self._prompt.touches_message(self._part.start, self._part.end)
        cuts = self._known_cuts(markers) if touched else []
        while True:
            pieces = cut_at(self._part, cuts)
            encoded = [self._encode(piece) for piece in pieces]
            found = set[int]().union(*encoded)
            forged = {i for i in found if i in markers or self._vocabulary.is_control(i)}
            if not forged or not touched:
                return [token_id for some in encoded for token_id in some]
            spellings = {text for i in forged for text in self._vocabulary.spellings(i)}
            more = sorted({*cuts, *forged_places(self._prompt, self._part, spellings)})
            if more == cuts:
                return self._without(pieces, encoded, forged)
            cuts = more

    def _known_cuts(self, markers: set[int]) -> list[int]:
        """Return the cuts for tokens of the template that the tokenizer would make of a message's text."""
        vocabulary = self._vocabulary
        texts = {
            token.text
            for token in vocabulary.special_tokens
            if (token.is_control or token.token_id in markers)
            and vocabulary.made_of_text(token.token_id)
        }
        return forged_places(self._prompt, self._part, texts)

    def _without(
        self, pieces: Sequence[TextPart], encoded: Sequence[list[int]], forged: set[int]
    ) -> list[int]:
        """Leave out the control tokens that a message's text makes in no spelling of theirs."""
        token_ids = []
        for piece, some in zip(pieces, encoded, strict=True):
            is_message = self._prompt.touches_message(piece.start, piece.end)
            token_ids += [i for i in some if not is_message or i not in forged]
        return token_ids

    def _encode(self, piece: TextPart) -> list[int]:
        data = self._prompt.data[piece.start : piece.end]
        if piece.start > self._part.start or self._continues:
            return self._vocabulary.encode_continued(data)
        return self._vocabulary.encode_text(data, self._before)
