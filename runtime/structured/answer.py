"""ConstrainedAnswer: one answer that follows a constraint, and that is whole wherever it has to end.

While tokens are chosen, a way to the end is known that fits into the tokens that are left. Where the next token would
leave too few, or where the context or the memory ends, the constraint alone closes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.structured.constraint import Constraint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds

MAX_CLOSING = 2048
"""Most tokens that close an answer which may have any length."""
SPARE_TOKENS = 16
"""Where more tokens are left than the way to the end has, an attempt ends by itself."""
PROBED_TOKENS = 64
"""The way to the end is looked for after so many tokens while many are left."""
NEAR_TOKENS = 256
"""It is known after every token where at most so many, and twice its own, are left."""
MAX_REFUSED = 16
"""Tokens behind which no end is found that are passed over for one; then the known way is taken for a token."""
LOG_WEIGHT_OF_CUT = -1000.0
"""The model did not complete an answer that had to be closed: among weighted answers, any complete one outweighs it."""


class NoLegalToken(ConstraintFailed):
    """No token of the model can follow an answer that may not end."""


class ConstrainedAnswer:
    """The constraint of one answer of at most `max_tokens` tokens, which `end_ids` may end.

    `context` is how many tokens the model can hold. Raises `BadOption` where no whole answer is known that is short
    enough.
    """

    def __init__(
        self,
        constraint: Constraint,
        end_ids: Sequence[int],
        max_tokens: int | None,
        context: int | None = None,
    ) -> None:
        self._constraint = constraint
        self._end_ids = tuple(end_ids)
        self._num_left = self._max_tokens = max_tokens
        self._context = context
        self._closing: Sequence[int] | None = self._shortest(constraint)
        self._is_closed = False
        self._is_watching = constraint.may_strand
        self._refused: set[int] = set()
        self.log_weight = 0.0
        self._log_weight_of_choice: float | None = None
        self._is_weighted = False
        self._num_closing = self._num_masks = self._num_tokens = self._num_skipped = 0

    def _shortest(self, constraint: Constraint) -> Sequence[int]:
        """Return the tokens of a short answer; raises `BadOption` where none is known that is short enough."""
        limits = [
            (self._max_tokens, f"{option('max_tokens')} is {self._max_tokens}: raise it"),
            (self._context, f"the context has {self._context} tokens: make it larger"),
        ]
        most, advice = min(
            ((limit, advice) for limit, advice in limits if limit is not None),
            default=(MAX_CLOSING, f"at most {MAX_CLOSING:,} tokens can be closed"),
        )
        reason = constraint.why_longer(most)
        if reason is not None:
            raise BadOption(
                f"the constraint cannot be completed: {reason}, but {advice}, or ask for less"
            )
        found = constraint.closing(MAX_CLOSING)
        if found is None and constraint.may_strand:
            raise BadOption(
                "no answer was found that follows all of the constraints: leave one of them out, or ask for less"
            )
        if found is None:
            largest = constraint.why_longer(MAX_CLOSING // 100)
            raise BadOption(
                f"the constraint cannot be completed: no answer was found within {MAX_CLOSING:,} tokens"
                f"{f' ({largest})' if largest else ''}; ask for less, or use a simpler grammar"
            )
        if len(found) > most:
            raise BadOption(
                f"the constraint needs about {len(found)} tokens for its shortest answer, but {advice}"
            )
        return found

    @property
    def is_verified_last(self) -> bool:
        """Whether the answer may turn out to be wrong when it is complete."""
        return self._constraint.enforced == "verified"

    def retry(self) -> ConstrainedAnswer | None:
        """Return another answer where this one, which has ended, is wrong; None where it stands.

        Raises `ConstraintFailed` where no other is tried.
        """
        again = self._constraint.retry()
        return (
            None
            if again is None
            else ConstrainedAnswer(again, self._end_ids, self._max_tokens, self._context)
        )

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take the tokens of the prompt, before the first token is chosen."""
        if not self._num_tokens:
            self._constraint.begin(prompt_ids)

    def fork(self) -> ConstrainedAnswer:
        """Return an independent copy."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        copy._constraint, copy._refused = self._constraint.fork(), set(self._refused)
        return copy

    def set_log_weight(self, log_weight: float) -> None:
        """Take the logarithm of the weight of the token that is chosen now; that of an appended one stays."""
        self._log_weight_of_choice = log_weight + self._constraint.log_offset
        self._is_weighted = True

    def note_illegal(self, token_id: int) -> None:
        """Hear that a token was drawn that may not come, so that it is drawn less often behind this text."""
        if token_id not in self._refused:
            self._constraint.note_illegal(token_id)

    def _add_log_weight(self) -> None:
        self.log_weight += self._log_weight_of_choice or 0.0
        self._log_weight_of_choice = None

    @property
    def constraint(self) -> Constraint:
        """The constraint behind the tokens so far."""
        return self._constraint

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return self._constraint.is_done

    @property
    def is_closed(self) -> bool:
        """Whether the constraint alone ends the answer now."""
        return self._is_closed

    @property
    def closing_reason(self) -> str:
        """Why the constraint ends the answer: no tokens are left, or no other way on is known."""
        num_free = (self._num_left or 0) - len(self._closing or ())
        return "stop" if self.is_verified_last and num_free > SPARE_TOKENS else "length"

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next; an end token may where the answer may end."""
        if token_id in self._end_ids:
            return self._constraint.is_accepting
        return token_id not in self._refused and self._constraint.allows(token_id)

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next, end tokens among them; raises `NoLegalToken` for none."""
        import numpy as np

        self._num_masks += 1
        if len(self._refused) >= MAX_REFUSED:
            return np.asarray(self._closing[:1] if self._closing else self._end_ids, np.int32)
        found = self._constraint.legal_ids()
        if self._refused:
            found = np.setdiff1d(found, np.fromiter(self._refused, np.int32), assume_unique=True)
        if self._constraint.is_accepting:
            found = np.union1d(found, np.asarray(self._end_ids, np.int32)).astype(np.int32)
        if not len(found):
            raise NoLegalToken(
                f"no token of the model can follow the answer after {self._num_tokens} tokens: change the "
                "schema or grammar"
            )
        return found

    def best_legal(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit, end tokens among them; None where the mask is to be asked."""
        found = None if self._refused else self._constraint.best_legal(logits)
        if found is None:
            return None
        self._num_masks += 1
        if self._constraint.is_accepting:
            known = (token_id for token_id in self._end_ids if token_id < len(logits))
            return max(sorted((found, *known)), key=lambda token_id: float(logits[token_id]))
        return found

    def legal_among(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Return which of the tokens may come next, end tokens among them, bool of the same shape."""
        import numpy as np

        self._num_masks += 1
        found = self._constraint.legal_among(token_ids)
        found[np.isin(token_ids, self._end_ids)] = self._constraint.is_accepting
        if self._refused:
            found &= ~np.isin(token_ids, [*self._refused])
            found &= len(self._refused) < MAX_REFUSED
        return found

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next, which are taken without asking the model."""
        if self._is_closed or self._constraint.needs_logits:
            return ()
        found = self._constraint.forced()
        return found[: self._constraint.num_legal(found)] if found else ()

    @property
    def takes_forced(self) -> bool:
        """Whether every forced token is taken, so that it can be computed before; the end may come instead."""
        return not self._constraint.may_strand

    def skip(self, num_tokens: int) -> None:
        """Note that forced tokens needed no pass of their own."""
        self._num_skipped += num_tokens

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits with the constraint's preferences."""
        return self._constraint.weigh(logits)

    def take(self, token_id: int) -> bool:
        """Append a chosen token where the answer can still be closed after it; return whether it was appended.

        Where it was not, the answer `is_closed`, and `closing` has the rest; or no end was found behind this token
        and there is room for another one, which is to be chosen.
        """
        if token_id in self._end_ids:
            self._add_log_weight()
            return True
        num_left = None if self._num_left is None else self._num_left - 1
        if not self._is_near(num_left):
            self._constraint.advance(token_id)
        else:
            state = self._constraint.fork()
            state.advance(token_id)
            limit = MAX_CLOSING if num_left is None else num_left
            closing = self._closing_after(state, token_id, limit)
            if closing is None and self._closing is not None:
                if self._constraint.may_strand and limit >= len(self._closing):
                    self._refused.add(token_id)
                else:
                    self._is_closed = True
                return False
            self._closing = closing
            self._constraint = state
        self._num_left = num_left
        self._refused.clear()
        self._add_log_weight()
        self._num_tokens += 1
        return True

    def _is_near(self, num_left: int | None) -> bool:
        """Whether the end of the tokens is so near that a way to the end of the answer must be known."""
        if not self._is_watching and num_left is not None:
            if self._num_tokens % PROBED_TOKENS == 0 and not self._knows_end(num_left + 1):
                self._closing = self._constraint.closing(num_left + 1) or self._closing
            if num_left <= NEAR_TOKENS + 2 * len(self._closing or ()):
                if not self._knows_end(num_left + 1):
                    self._closing = self._constraint.closing(num_left + 1)
                self._is_watching = True
        return self._is_watching

    def _knows_end(self, max_tokens: int) -> bool:
        """Whether the way to the end that was known tokens ago still is one, of at most so many tokens."""
        closing = self._closing
        return closing is not None and len(closing) <= max_tokens and self._constraint.ends(closing)

    def _closing_after(
        self, state: Constraint, token_id: int, max_tokens: int
    ) -> Sequence[int] | None:
        """Return a way to the end from `state`, which is the answer after `token_id`."""
        if self._closing is not None:
            rest = state.closing_after(self._closing, token_id, max_tokens)
            if rest is not None:
                return rest
        return state.near_closing(max_tokens) if self._closing else state.closing(max_tokens)

    def close(self) -> Sequence[int]:
        """Return the tokens that close the answer, () where it is complete or no way is found."""
        self._is_closed = True
        if self._constraint.is_accepting:
            return ()
        closing = self._closing if self._is_watching else None
        limit = MAX_CLOSING if self._num_left is None else self._num_left
        if closing is None:
            closing = self._constraint.closing(limit) or ()
        self._constraint.note_cut()
        self.log_weight += LOG_WEIGHT_OF_CUT
        closing = self._constraint.checked_closing(closing, limit)
        for token_id in closing:
            self._constraint.advance(token_id)
        self._num_closing = len(closing)
        return closing

    def statistics(self) -> dict[str, Any]:
        """Return the values of `Statistics.structured`."""
        return {
            "enforced": self._constraint.enforced,
            "attempts": self._constraint.num_attempts,
            "complete": self._constraint.is_accepting,
            "closed": self._is_closed and self._constraint.is_accepting,
            "closing_tokens": self._num_closing,
            "masks": self._num_masks,
            "passes_saved": self._num_skipped,
            **({"log_weight": self.log_weight} if self._is_weighted else {}),
            **self._constraint.report(),
        }
