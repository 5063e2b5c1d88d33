"""RuleConstraint: a rule for texts over the tokens of a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.closing import find_closing
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.rules.token_order import TokenOrder
from lowtide.runtime.structured.vocabulary import TokenVocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.runtime.structured.constraint import TokenIds

MAX_MASKS = 64
"""Masks that are kept, by the state of the rule: one is a bit for each token."""


class RuleConstraint(Constraint):
    """One answer that follows a rule. Copies share the masks that were computed."""

    def __init__(self, rule: TextRule, vocabulary: TokenVocabulary) -> None:
        self.rule = rule
        self.state = rule.start
        self._vocabulary = vocabulary
        self._masks: dict[Hashable, NDArray[np.uint8]] = {}

    def fork(self) -> RuleConstraint:
        """Return an independent copy."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        return copy

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return self._behind(self.state, token_id) is not None

    def _behind(self, state: Any, token_id: int) -> Any:
        """Return the state behind a token; None where it may not come."""
        if token_id >= self._vocabulary.num_tokens or token_id in self._vocabulary.end_ids:
            return None
        text = self._vocabulary.bytes_of(token_id)
        if not text:
            return state if self.rule.is_free else None
        return self.rule.step(state, text)

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        state = self.state
        for count, token_id in enumerate(token_ids):
            state = self._behind(state, token_id)
            if state is None:
                return count
        return len(token_ids)

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens may come one after the other and the answer may end behind them."""
        state = self.state
        for token_id in token_ids:
            state = self._behind(state, token_id)
            if state is None:
                return False
        return self.rule.is_accepting(state)

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        import numpy as np

        bits = self._masks.get(self.state)
        if bits is None:
            bits = np.packbits(self._mask())
            while len(self._masks) >= MAX_MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[self.state] = bits
        found = np.unpackbits(bits, count=self._vocabulary.num_tokens)
        return np.flatnonzero(found).astype(np.int32)

    def _mask(self) -> Any:
        tokens = self._vocabulary.cached(TokenOrder)
        mask = self.rule.legal(self.state, tokens)
        if not self.rule.is_free:
            mask = mask & tokens.has_text
        mask[list(self._vocabulary.end_ids)] = False
        return mask

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        self.state = self._behind(self.state, token_id)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self.rule.is_accepting(self.state)

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self.rule.is_done(self.state)

    @property
    def may_strand(self) -> bool:
        """Whether legal tokens may lead where no end can be reached: where the vocabulary cannot write every text."""
        return not self.rule.is_free and len(self._vocabulary.single_bytes) < 256

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next."""
        text = self.rule.forced(self.state)
        tokens = self._vocabulary.encode(text) if text else ()
        # What follows may change how the end of the text is written.
        return tokens if self.ends(tokens) and tokens else tokens[:-1]

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end, as the tokenizer writes them or byte by byte."""
        text = self.rule.ending(self.state)
        if text is not None:
            for tokens in self._written(text):
                if self.ends(tokens):
                    return tokens if len(tokens) <= max_tokens else None
        return find_closing(self, max_tokens)

    def _written(self, text: bytes) -> Iterable[Sequence[int]]:
        """Yield tokens that write a text."""
        tokens = self._vocabulary.encode(text) if text else ()
        if tokens or not text:
            yield tuple(tokens)
        single = self._vocabulary.single_bytes
        if all(byte in single for byte in text):
            yield tuple(single[byte] for byte in text)

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield what leads to the end."""
        for text in self.rule.hints(self.state):
            yield from self._written(text)
