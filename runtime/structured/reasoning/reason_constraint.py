"""ReasonConstraint: free text up to a marker, then an answer that follows another constraint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.reasoning.markers import COMPLETE, Markers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds


class ReasonConstraint(Constraint):
    """Reasoning of at most `most` tokens, the marker behind it, and the answer that `inner` constrains."""

    def __init__(
        self, inner: Constraint, markers: Markers, most: int, opening: tuple[int, ...] = ()
    ) -> None:
        self._inner, self._markers, self._most = inner, markers, most
        self._opening = self._pending = opening
        """The tokens that must come next, before the choice is free or the answer begins."""
        self._is_ending = self._is_answer = self._wants_end = False
        self._at = self._num_free = self._num_tokens = 0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the tokens of the prompt, which may have begun the reasoning."""
        self._inner.begin(prompt_ids)
        self._opening = self._pending = self._markers.opening(prompt_ids)

    def fork(self) -> ReasonConstraint:
        """Return an independent copy."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        if self._is_answer:
            copy._inner = self._inner.fork()
        return copy

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        if self._is_answer:
            return self._inner.allows(token_id)
        if self._pending:
            return token_id == self._pending[0]
        return self._markers.step(self._at, token_id) is not None

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        import numpy as np

        if self._is_answer:
            return self._inner.legal_ids()
        if self._pending:
            return np.asarray(self._pending[:1], np.int32)
        return self._markers.legal_ids(self._at)

    def legal_among(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Return which of the tokens may come next."""
        return (
            self._inner.legal_among(token_ids)
            if self._is_answer
            else super().legal_among(token_ids)
        )

    def best_legal(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit; None where `legal_ids` is to be asked."""
        return self._inner.best_legal(logits) if self._is_answer else None

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        return self._inner.num_legal(token_ids) if self._is_answer else super().num_legal(token_ids)

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        if self._is_answer:
            self._inner.advance(token_id)
            return
        self._num_tokens += 1
        if self._pending:
            self._pending = self._pending[1:]
        elif self._wants_end and token_id == self._markers.closing[0]:
            self._pending, self._is_ending = self._markers.closing[1:], True
        else:
            self._num_free += 1
            state = self._markers.step(self._at, token_id)
            assert state is not None, "the token is not allowed"
            if state == COMPLETE:
                self._pending, self._is_ending = self._markers.gap, True
            else:
                self._at = state
                if self._num_free >= self._most:
                    self._pending, self._is_ending = self._markers.closing, True
        self._wants_end = False
        if self._is_ending and not self._pending:
            # Copies made before share the constraint of the answer, which has not begun for them.
            self._is_answer, self._inner = True, self._inner.fork()

    @property
    def _rest(self) -> tuple[int, ...]:
        """The tokens that lead to the answer."""
        return self._pending if self._is_ending else (*self._pending, *self._markers.closing)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here: never before it begins."""
        return self._is_answer and self._inner.is_accepting

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self._is_answer and self._inner.is_done

    @property
    def may_strand(self) -> bool:
        """Whether legal tokens may lead where no end can be reached."""
        return self._inner.may_strand

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next."""
        return self._inner.forced() if self._is_answer else self._pending

    @property
    def needs_logits(self) -> bool:
        """Whether the logits of every token must be seen."""
        return self._inner.needs_logits

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what makes every answer longer than so many tokens: room for all of the reasoning is reserved."""
        rest = max_tokens - self._most - len(self._rest)
        if rest <= 0:
            return f"its reasoning may take {self._most:,} tokens and {len(self._rest)} more end it"
        return self._inner.why_longer(rest)

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that end the reasoning and bring the answer to an end."""
        return self._inner.closing(max_tokens) if self._is_answer else self._ended(max_tokens)

    def _ended(self, max_tokens: int) -> Sequence[int] | None:
        rest = self._rest
        found = self._inner.closing(max_tokens - len(rest)) if max_tokens > len(rest) else None
        return None if found is None else (*rest, *found)

    def near_closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end where they are found soon."""
        return self._inner.near_closing(max_tokens) if self._is_answer else self._ended(max_tokens)

    def checked_closing(self, closing: Sequence[int], max_tokens: int) -> Sequence[int]:
        """Return `closing`, or a better one."""
        rest = () if self._is_answer else self._rest
        if tuple(closing[: len(rest)]) != rest:
            return closing
        return (
            *rest,
            *self._inner.checked_closing(closing[len(rest) :], max_tokens - len(rest)),
        )

    def closing_after(
        self, closing: Sequence[int], token_id: int, max_tokens: int
    ) -> Sequence[int] | None:
        """Return a way to the end behind `token_id`, which was appended last, where `closing` was one before it."""
        if self._is_answer:
            return self._inner.closing_after(closing, token_id, max_tokens)
        return super().closing_after(closing, token_id, max_tokens)

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end; the marker may be written by now."""
        if self._is_answer:
            yield from self._inner.rests(closing, token_id)
            return
        yield closing
        yield (*self._rest, *closing[len(self._markers.closing) :])

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield tokens that tend to lead to the end."""
        return self._inner.likely_next() if self._is_answer else (self._rest,)

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits with the preferences for the answer.

        Where the model would end its text instead of going on to reason, what ends the reasoning is as likely.
        """
        if self._is_answer:
            return self._inner.weigh(logits)
        best = int(logits.argmax())
        self._wants_end = not self._pending and self._markers.is_end(best)
        if not self._wants_end:
            return logits
        changed = logits.copy()
        changed[self._markers.closing[0]] = logits[best]
        return changed

    def note_illegal(self, token_id: int) -> None:
        """Hear that a token was drawn that may not come."""
        if self._is_answer:
            self._inner.note_illegal(token_id)

    def note_cut(self) -> None:
        """Hear that the answer is closed now."""
        self._inner.note_cut()

    def retry(self) -> ReasonConstraint | None:
        """Return another attempt, with reasoning of its own, where the answer is wrong."""
        again = self._inner.retry()
        if again is None:
            return None
        return ReasonConstraint(again, self._markers, self._most, self._opening)

    @property
    def num_attempts(self) -> int:
        """How many attempts were made at the answer, with this one."""
        return self._inner.num_attempts

    @property
    def enforced(self) -> str:
        """How the rules of the answer hold."""
        return self._inner.enforced

    def report(self) -> dict[str, Any]:
        """Return how many tokens come before the answer, the markers among them."""
        return {"reasoning_tokens": self._num_tokens, **self._inner.report()}
