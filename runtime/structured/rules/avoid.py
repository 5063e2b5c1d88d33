"""Avoid: texts that never appear in an answer, over the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.rules.byte_table import TextMatcher
from lowtide.runtime.structured.rules.rule_constraint import RuleConstraint
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.rules.token_order import TokenOrder

if TYPE_CHECKING:
    from lowtide.models.model import Logits
    from lowtide.runtime.structured.rules.text_rule import Mask


class AvoidRule(TextRule):
    """No text of a list appears. The state is that of the matcher."""

    start = 0

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._matcher = TextMatcher(texts, is_absorbing=True)

    def step(self, state: int, text: bytes) -> int | None:
        """Return the state behind `text`; None where one of the texts ends in it."""
        found = self._matcher.table.steps(state, text)
        return None if self._matcher.hits[found] else found

    def legal(self, state: int, tokens: TokenOrder) -> Mask:
        """Return which tokens complete none of the texts."""
        return ~self._matcher.hits[tokens.follow(self._matcher.table, state)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the matcher."""
        return self._matcher.table.num_bytes


class AvoidConstraint(RuleConstraint):
    """Counts how often the model's most probable token was refused: a text would have been complete."""

    num_avoided = 0
    _is_counted = False

    def weigh(self, logits: Logits) -> Logits:
        """Look at the most probable token, once for each that is chosen; change nothing."""
        if not self._is_counted:
            best = int(logits.argmax())
            self.num_avoided += best not in self._vocabulary.end_ids and not self.allows(best)
            self._is_counted = True
        return logits

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        super().advance(token_id)
        self._is_counted = False

    def report(self) -> dict[str, Any]:
        """Return how often a text was avoided."""
        return {"avoided": self.num_avoided}
