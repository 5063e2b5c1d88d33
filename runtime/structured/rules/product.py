"""Product: an answer that follows several constraints at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.closing import find_closing_of_many, find_near_closing
from lowtide.runtime.structured.constraint import Constraint

if TYPE_CHECKING:
    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds

FEW = 64
"""So few tokens are asked for one by one, which is cheaper than a mask."""


class Product(Constraint):
    """All of `parts` hold. A token may come where all of them allow it."""

    def __init__(self, parts: Sequence[Constraint], starts: Sequence[Constraint] = ()) -> None:
        self._parts = tuple(parts)
        self._starts = tuple(starts) or tuple(part.fork() for part in parts)

    def fork(self) -> Product:
        """Return an independent copy."""
        return Product([part.fork() for part in self._parts], self._starts)

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the tokens of the prompt."""
        for part in self._parts:
            part.begin(prompt_ids)

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return all(part.allows(token_id) for part in self._parts)

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        count = len(token_ids)
        for part in self._parts:
            count = part.num_legal(token_ids[:count])
        return count

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        import numpy as np

        first, *others = self._parts
        found = first.legal_ids()
        for part in others:
            if len(found) <= FEW:
                found = found[[part.allows(token_id) for token_id in found.tolist()]]
                continue
            other = part.legal_ids()
            is_legal = np.zeros(max(int(found[-1]), int(other.max(initial=0))) + 1, np.bool_)
            is_legal[other] = True
            found = found[is_legal[found]]
        return found

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        for part in self._parts:
            part.advance(token_id)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return all(part.is_accepting for part in self._parts)

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self.is_accepting and any(part.is_done for part in self._parts)

    @property
    def may_strand(self) -> bool:
        """One part may ask for what another one forbids, tokens later."""
        return True

    @property
    def needs_logits(self) -> bool:
        """Whether one of the parts needs them."""
        return any(part.needs_logits for part in self._parts)

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what one of the parts asks for."""
        return next((why for part in self._parts if (why := part.why_longer(max_tokens))), None)

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next: what one part forces, all have to take."""
        return next((found for part in self._parts if (found := part.forced())), ())

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end: those of one part where they suffice for all."""
        found = self._closing_of_one(max_tokens)
        return find_closing_of_many(self, max_tokens) if found is None else found

    def near_closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end where a few steps find them."""
        found = self._closing_of_one(max_tokens)
        return find_near_closing(self, max_tokens) if found is None else found

    def _closing_of_one(self, max_tokens: int) -> Sequence[int] | None:
        for part in self._parts:
            found = part.near_closing(max_tokens)
            if found is not None and self.ends(found):
                return found
        return None

    def checked_closing(self, closing: Sequence[int], max_tokens: int) -> Sequence[int]:
        """Return `closing`, or a better one that all parts allow."""
        for part in self._parts:
            found = part.checked_closing(closing, max_tokens)
            if found != closing and self.ends(found):
                return found
        return closing

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens bring the answer to an end."""
        return all(part.ends(token_ids) for part in self._parts)

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end."""
        for part in self._parts:
            yield from part.rests(closing, token_id)

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield tokens that lead one of the parts to its end: of those that are not there yet, the pickiest first."""
        ways = [(part.is_accepting, list(part.likely_next())) for part in self._parts]
        for _, tokens in sorted(ways, key=lambda way: (way[0], len(way[1]))):
            yield from tokens

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits with the preferences of all parts."""
        for part in self._parts:
            logits = part.weigh(logits)
        return logits

    def retry(self) -> Product | None:
        """Return another attempt where one part asks for it."""
        again = [part.retry() for part in self._parts]
        if all(part is None for part in again):
            return None
        begun = [new or start.fork() for new, start in zip(again, self._starts, strict=True)]
        return Product(begun, self._starts)

    @property
    def num_attempts(self) -> int:
        """How many answers were tried, with this one."""
        return max(part.num_attempts for part in self._parts)

    @property
    def enforced(self) -> str:
        """How the weakest part holds."""
        found = {part.enforced for part in self._parts}
        return "verified" if "verified" in found else "exact"

    def report(self) -> dict[str, Any]:
        """Return what the parts report."""
        return {name: value for part in self._parts for name, value in part.report().items()}
