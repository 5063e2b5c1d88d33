"""A toy model whose answers under a constraint can all be listed: a second-order Markov chain over six symbols.

The constraint has a trap: a text must have an even number of the first symbol when it ends, which nothing shows before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lowtide.runtime.structured.constraint import Constraint

END, LONGEST = 6, 7
_BASE = np.random.default_rng(0).normal(0, 1.6, (END + 1, END + 1, END + 1))
_BASE[:, :, END] -= 0.5


def logits_after(text: Sequence[int]) -> np.ndarray:
    """Return the logits behind a text; the longest texts can only end."""
    before = text[-2] if len(text) > 1 else END
    logits: np.ndarray = _BASE[before, text[-1] if text else END].astype(np.float32)
    if len(text) == LONGEST:
        logits[:END] = -1e9
    return logits


def log_chances(text: Sequence[int]) -> np.ndarray:
    """Return the logarithms of the next token's probabilities."""
    values = logits_after(text).astype(np.float64)
    values -= values.max()
    logged: np.ndarray = values - math.log(np.exp(values).sum())
    return logged


class EvenFirst(Constraint):
    """Texts of at most `LONGEST` symbols, without two of symbol 1 in a row and with an even number of symbol 0."""

    def __init__(self, text: tuple[int, ...] = ()) -> None:
        self.text = text

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        is_double = token_id == 1 and self.text[-1:] == (1,)
        return token_id < END and len(self.text) < LONGEST and not is_double

    def legal_ids(self) -> np.ndarray:
        """Return all tokens that may come next."""
        return np.array([i for i in range(END) if self.allows(i)], np.int32)

    def advance(self, token_id: int) -> None:
        """Append a token."""
        self.text = (*self.text, token_id)

    def fork(self) -> EvenFirst:
        """Return a copy."""
        return EvenFirst(self.text)

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return self.text.count(0) % 2 == 0


def exact_distribution() -> dict[tuple[int, ...], float]:
    """Return the probability of every text that follows the constraint, given that it does."""
    found: dict[tuple[int, ...], float] = {}

    def walk(state: EvenFirst, logged: float) -> None:
        chances = log_chances(state.text)
        if state.is_accepting:
            found[state.text] = math.exp(logged + chances[END])
        for token_id in state.legal_ids().tolist():
            behind = state.fork()
            behind.advance(token_id)
            walk(behind, logged + chances[token_id])

    walk(EvenFirst(), 0.0)
    total = sum(found.values())
    return {text: chance / total for text, chance in found.items()}


def total_variation(
    counts: Mapping[tuple[int, ...], float], exact: Mapping[tuple[int, ...], float]
) -> float:
    """Return the total variation between a sample and the exact distribution."""
    total = sum(counts.values())
    texts = {*counts, *exact}
    return 0.5 * sum(abs(counts.get(one, 0) / total - exact.get(one, 0)) for one in texts)


def perfect_variation(num_drawn: int, exact: Mapping[tuple[int, ...], float]) -> float:
    """Return the total variation of as many draws from the exact distribution itself."""
    chances = np.array(list(exact.values()))
    drawn = np.random.default_rng(1).multinomial(num_drawn, chances / chances.sum())
    counts = Counter({text: int(count) for text, count in zip(exact, drawn, strict=True) if count})
    return total_variation(counts, exact)
