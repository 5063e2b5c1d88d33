"""Must: texts that have to appear in an answer before it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lowtide.runtime.structured.rules.byte_table import TextMatcher
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.rules.token_order import TokenOrder

if TYPE_CHECKING:
    from lowtide.runtime.structured.rules.text_rule import Mask

State = tuple[int, int]
"""The state of the matcher, and the texts that appeared, as bits."""


class MustRule(TextRule):
    """Every text of a list appears."""

    start: State = (0, 0)

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = tuple(texts)
        self._matcher = TextMatcher(texts)
        self._all = (1 << len(texts)) - 1

    def step(self, state: State, text: bytes) -> State:
        """Return the state behind `text`."""
        at, found = state
        for byte in text:
            at = self._matcher.table.step(at, byte)
            found |= self._matcher.found[at]
        return at, found

    def legal(self, state: State, tokens: TokenOrder) -> Mask:
        """Return that every token may come: only the end waits for the texts."""
        import numpy as np

        return np.ones(tokens.num_tokens, np.bool_)

    def is_accepting(self, state: State) -> bool:
        """Whether all texts appeared."""
        return state[1] == self._all

    def _missing(self, state: State) -> list[bytes]:
        return [text for i, text in enumerate(self._texts) if not state[1] >> i & 1]

    def ending(self, state: State) -> bytes:
        """Return the missing texts, the one that has begun first, with blanks between them."""
        written = b""
        missing = self._missing(state)
        begun = self._matcher.prefixes[state[0]]
        if begun:
            going_on = [text for text in missing if text.startswith(begun)]
            if going_on:
                written = going_on[0][len(begun) :]
        while missing := self._missing(self.step(state, written)):
            written += b" " + missing[0]
        return written

    def hints(self, state: State) -> Iterable[bytes]:
        """Yield the rest of a text that has begun, and every text that is missing."""
        begun = self._matcher.prefixes[state[0]]
        for text in self._missing(state):
            if begun and text.startswith(begun):
                yield text[len(begun) :]
        yield from self._missing(state)

    @property
    def num_bytes(self) -> int:
        """Bytes of the matcher."""
        return self._matcher.table.num_bytes
