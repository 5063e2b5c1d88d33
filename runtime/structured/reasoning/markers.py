"""Markers: what ends the reasoning of an answer, in a model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.byte_table import TextMatcher
from lowtide.runtime.structured.rules.token_order import TokenOrder
from lowtide.runtime.structured.vocabulary import TokenVocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.runtime.structured.constraint import TokenIds

THINK, END_OF_THINK = "<think>", "</think>"
"""The markers of models that were trained to reason, where the vocabulary has a token for each."""
END_TEXT = "Answer:"
"""The marker of other models."""
COMPLETE = -1
"""Behind the marker."""


class Markers:
    """The text or control token that ends the reasoning: `end`, or for None what the model was trained to write.

    `opening` are tokens that come before the reasoning where the prompt does not have them, `gap` those between marker
    and answer, and `closing` a line break, the marker and the gap. Raises `BadOption` where it cannot be written.
    """

    def __init__(self, vocabulary: TokenVocabulary, end: str | None) -> None:
        self._vocabulary = vocabulary
        self._think = _think_ids(vocabulary) if end is None else None
        is_own, gap = end is not None, "\n\n" if self._think else "\n"
        if end is None:
            end = END_OF_THINK if self._think else END_TEXT
        only = vocabulary.token_of(end)
        self._end_id = only if only is not None and not vocabulary.bytes_of(only) else None
        # A text of the caller's own may be spelled, too, where a control token stands for it.
        self._matcher = finder_of(end) if is_own or self._end_id is None else None
        self.gap = self._written(gap)
        written = self._written(end) if self._end_id is None else (self._end_id,)
        self.closing = (*self._written("\n"), *written, *self.gap)
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def _written(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text, byte by byte where the tokenizer would change it."""
        vocabulary, data = self._vocabulary, text.encode()
        found = vocabulary.encode(data)
        if found:
            return tuple(found)
        if not all(byte in vocabulary.single_bytes for byte in data):
            raise BadOption(
                f"the model's vocabulary cannot write {text!r}, which ends the reasoning: pass another "
                f"{option('reason_end')}"
            )
        return tuple(vocabulary.single_bytes[byte] for byte in data)

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends a text of the model."""
        return token_id in self._vocabulary.end_ids

    def opening(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens that begin the reasoning behind a prompt; none where the prompt has begun it."""
        if self._think is None:
            return ()
        begins, ends = self._think
        last = next((one for one in reversed(prompt_ids) if one in (begins, ends)), None)
        return () if last == begins else (begins, *self._written("\n"))

    def step(self, state: int, token_id: int) -> int | None:
        """Return the state behind a token, `COMPLETE` behind the marker; None where the token may not come.

        A token may not go on behind the end of the marker, where the answer begins.
        """
        vocabulary = self._vocabulary
        if token_id == self._end_id:
            return COMPLETE
        if token_id >= vocabulary.num_tokens or token_id in vocabulary.end_ids:
            return None
        text = vocabulary.bytes_of(token_id)
        if not text or self._matcher is None:
            return state if text else None
        table, hits = self._matcher.table, self._matcher.hits
        before = table.steps(state, text[:-1])
        if hits[before]:
            return None
        behind = table.step(before, text[-1])
        return COMPLETE if hits[behind] else behind

    def legal_ids(self, state: int) -> TokenIds:
        """Return the tokens that may come, ascending, int32 of shape (count,)."""
        import numpy as np

        bits = self._masks.get(state)
        if bits is None:
            bits = self._masks[state] = np.packbits(self._mask(state))
        found = np.unpackbits(bits, count=self._vocabulary.num_tokens)
        return np.flatnonzero(found).astype(np.int32)

    def _mask(self, state: int) -> NDArray[np.bool_]:
        import numpy as np

        tokens = self._vocabulary.cached(TokenOrder)
        legal = tokens.has_text.copy()
        if self._matcher is not None:
            hits = self._matcher.hits[tokens.follow(self._matcher.table, state)]
            for token_id in np.flatnonzero(hits).tolist():
                legal[token_id] = self.step(state, token_id) is not None
        legal[list(self._vocabulary.end_ids)] = False
        if self._end_id is not None:
            legal[self._end_id] = True
        return legal


def finder_of(end: str) -> TextMatcher:
    """Return what finds the text that ends the reasoning: it has a state, and at most a mask, for each byte."""
    return TextMatcher([end.encode()], is_absorbing=True)


def _think_ids(vocabulary: TokenVocabulary) -> tuple[int, int] | None:
    """Return the tokens of the markers of models that were trained to reason; None where one is missing."""
    begins, ends = vocabulary.token_of(THINK), vocabulary.token_of(END_OF_THINK)
    return None if begins is None or ends is None or begins == ends else (begins, ends)
