"""Constraint: which tokens may come next in one answer. The one interface that sampling and speculation ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.closing import find_closing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.model import Logits

    TokenIds = NDArray[np.int32]


class Constraint(ABC):
    """The rules for the tokens of one answer, and how far the answer is.

    It knows tokens and no model. It never sees end tokens: an answer may end where `is_accepting`, and must
    end where `is_done`. A constraint of your own implements the abstract methods.
    """

    @abstractmethod
    def allows(self, token_id: int) -> bool:
        """Whether the token may come next. Changes nothing."""

    @abstractmethod
    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next, ascending, int32 of shape (count,): the mask."""

    def legal_among(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Return which of the tokens may come next, bool of the same shape."""
        import numpy as np

        found: NDArray[np.bool_] = np.isin(token_ids, self.legal_ids())
        return found

    def best_legal(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit; None where none is, or where `legal_ids` is to be asked."""
        return None

    @abstractmethod
    def advance(self, token_id: int) -> None:
        """Append a token that `allows` returned True for."""

    @abstractmethod
    def fork(self) -> Constraint:
        """Return an independent copy."""

    @property
    @abstractmethod
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""

    @property
    def is_done(self) -> bool:
        """Whether no token may follow."""
        return self.is_accepting and not len(self.legal_ids())

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the tokens of the prompt, before the first token of the answer."""
        return

    def note_illegal(self, token_id: int) -> None:
        """Hear that a token was drawn that may not come: nothing follows from it here."""
        return

    def note_cut(self) -> None:
        """Hear that the answer is closed now because it was not complete in time."""
        return

    @property
    def log_offset(self) -> float:
        """The logarithm of the factor by which `weigh` changed the weight of the token that is chosen now."""
        return 0.0

    @property
    def may_strand(self) -> bool:
        """Whether legal tokens may lead where no end can be reached; a way to the end is then known at every token."""
        return False

    def report(self) -> dict[str, Any]:
        """Return what the statistics say of this answer beside `enforced` and the others."""
        return {}

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens, from the first on, may come one after the other. Changes nothing."""
        copy = self.fork()
        for count, token_id in enumerate(token_ids):
            if not copy.allows(token_id):
                return count
            copy.advance(token_id)
        return len(token_ids)

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next; none where several texts may come.

        They are taken as they are, also where the text has other tokens.
        """
        return ()

    @property
    def needs_logits(self) -> bool:
        """Whether the logits of every token must be seen; else forced text is taken without asking the model."""
        return False

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return at most `max_tokens` tokens that bring the answer to an end; None where none are found."""
        return find_closing(self, max_tokens)

    def near_closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens as `closing` does, where one is known behind another token: it may be missed, in less time."""
        return self.closing(max_tokens)

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what makes every answer longer than so many tokens, asked before an end is searched for.

        None where nothing is known to.
        """
        return None

    def checked_closing(self, closing: Sequence[int], max_tokens: int) -> Sequence[int]:
        """Return `closing`, or a better one, before the answer is closed by it."""
        return closing

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens may come one after the other and the answer may end behind them. Changes nothing."""
        copy = self.fork()
        for token_id in token_ids:
            if not copy.allows(token_id):
                return False
            copy.advance(token_id)
        return copy.is_accepting

    def closing_after(
        self, closing: Sequence[int], token_id: int, max_tokens: int
    ) -> Sequence[int] | None:
        """Return a way to the end behind `token_id`, which was appended last, where `closing` was one before it.

        None where none of at most `max_tokens` tokens is seen at once.
        """
        if closing and closing[0] == token_id:
            return closing[1:]
        for rest in self.rests(closing, token_id):
            if len(rest) <= max_tokens and self.ends(rest):
                return rest
        return None

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end behind `token_id`, where `closing` did before it."""
        yield closing

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield tokens that tend to lead to the end, the best first; `closing` tries those that are legal."""
        return ()

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits, shape (vocabulary,), changed by preferences; illegal tokens need no change."""
        return logits

    def retry(self) -> Constraint | None:
        """Return the start of another attempt where the answer, which has ended, is wrong; None where it stands.

        Raises `ConstraintFailed` where no other is tried. Rules that hold for every token need no second attempt.
        """
        return None

    @property
    def num_attempts(self) -> int:
        """How many attempts were made at the answer, with this one."""
        return 1

    @property
    def enforced(self) -> str:
        """How the rules hold: "exact" while tokens are chosen, or "verified" when the answer is complete."""
        return "exact"
