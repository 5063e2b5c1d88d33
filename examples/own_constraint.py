"""A constraint of your own: a lipogram, a text without one letter, with at least so many tokens.

Run it: python examples/own_constraint.py
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lowtide import Constraint, OutputFormat, Runtime
from lowtide.runtime.structured.vocabulary import TokenVocabulary


@dataclass
class Without(OutputFormat, Constraint):
    """As a format it has the letter; as the constraint of an answer the legal tokens and their number so far, too."""

    letter: bytes
    least: int
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    num_tokens: int = 0

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        tokens = enumerate(vocabulary.all_bytes())
        ids = [i for i, token in tokens if token and self.letter not in token.lower()]
        return replace(self, ids=np.array(ids, np.int32))

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        at = int(np.searchsorted(self.ids, token_id))
        return at < len(self.ids) and bool(self.ids[at] == token_id)

    def legal_ids(self) -> np.ndarray:
        """Return all tokens that may come next."""
        return self.ids

    def advance(self, token_id: int) -> None:
        """Append a token."""
        self.num_tokens += 1

    def fork(self) -> Constraint:
        """Return an independent copy."""
        return replace(self)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self.num_tokens >= self.least


if __name__ == "__main__":
    with Runtime.open(memory="400MiB", context=512, structured=True) as runtime:
        params = {"temperature": 0, "max_tokens": 40}
        result = runtime.generate("The sea is", constraint=Without(b"e", 12), **params)
    print(
        f"{result.text}\nhas no e: {'e' not in result.text.lower()}; {len(result.token_ids)} tokens"
    )
