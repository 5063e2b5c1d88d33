"""GrammarConstraint: llguidance behind the interface of `Constraint`. It reads JSON schemas, regexes and grammars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.legal_tokens import best_legal, legal_ids
from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.structured.closing import find_closing, find_greedy_closing
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.extent.extent import UNKNOWN, Extent
from lowtide.runtime.structured.grammar.advice import NONE_KNOWN, START, Advice, JsonPlace
from lowtide.runtime.structured.grammar.library import LIMITS, llguidance
from lowtide.runtime.structured.vocabulary import TokenVocabulary

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds

SLICE = r'[^"\\\x00-\x1F\x7F]{1,30}'
"""Tokens of plain text in a string are checked as one group. A second group costs memory and saves no time."""
_CLOSERS = b'}]",:0naeltrusf1{[ -.23456789zAT'
"""The bytes that tend to end a JSON value, the best first."""
MAX_ASKED = 8
"""So many tokens are checked one by one, 2 microseconds each; then the mask of all is computed, 20 to 50."""

MAX_LEFT_OUT = 4
"""Of a known way to the end, so many tokens at its start may be left out."""


class GrammarTokenizer:
    """A model's vocabulary in llguidance's form, shared by all constraints of the model.

    The library copies the bytes of the tokens: it holds no pointer into the model.
    """

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        library = llguidance()
        self.vocabulary = vocabulary
        self._first_end = vocabulary.end_ids[0] if vocabulary.end_ids else 0
        self.tokenizer: LLTokenizer = library.LLTokenizer(
            library.TokenizerWrapper(_Wrapped(vocabulary)),
            eos_token=list(vocabulary.end_ids) or None,
            slices=[SLICE],
        )
        self._single = vocabulary.single_bytes
        order = dict.fromkeys([*_CLOSERS, *range(32, 127)])
        self.ends = tuple((self._single[one],) for one in order if one in self._single)

    def spelled(self, text: bytes) -> tuple[int, ...]:
        """Return the tokens of the text's single bytes; () where the vocabulary lacks one."""
        found = tuple(self._single[one] for one in text if one in self._single)
        return found if len(found) == len(text) else ()

    def matcher(self, grammar: str) -> LLMatcher:
        """Return a matcher at the start of a grammar; raises `GrammarError` where it cannot be used."""
        library = llguidance()
        limits = library.LLParserLimits(**LIMITS)
        made: LLMatcher = library.LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        if not made.is_error():
            made.compute_bitmask()  # a `$ref` to itself is an error of the first mask
        if made.is_error():
            raise GrammarError(made.get_error())
        return made


class GrammarError(Exception):
    """What llguidance says of a grammar that it cannot use."""


def grammar_from(make: Callable[..., str], source: str, **options: Any) -> str:
    """Return the grammar that a function of llguidance makes of `source`; raises `GrammarError` where it refuses.

    The functions raise `ValueError`, for example where JSON is nested deeper than their reader can follow.
    """
    try:
        return make(source, **options)
    except ValueError as error:
        raise GrammarError(str(error)) from None


class _Wrapped:
    """The attributes that llguidance reads: control tokens are special, so that no text contains them."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self.tokens = vocabulary.all_bytes()
        ends = set(vocabulary.end_ids)
        self.special_token_ids = [
            i for i, token in enumerate(self.tokens) if not token or i in ends
        ]
        for i in self.special_token_ids:
            self.tokens[i] = b"<special_%d>" % i
        self.eos_token_id = vocabulary.end_ids[0] if vocabulary.end_ids else 0
        self.bos_token_id = None
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        # The library takes text without tokens for text that was written: what must come next would be lost.
        written = text if isinstance(text, bytes) else text.encode()
        single = self._vocabulary.single_bytes
        return self._vocabulary.encode(written) or [single[one] for one in written if one in single]


class GrammarConstraint(Constraint):
    """One answer in a grammar of llguidance."""

    def __init__(
        self,
        tokenizer: GrammarTokenizer,
        matcher: LLMatcher,
        advice: Advice = NONE_KNOWN,
        written: bytes = b"",
        place: JsonPlace = START,
        extent: Extent = UNKNOWN,
    ) -> None:
        self.extent = extent
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._advice = advice
        self._written, self._place = written, place
        self._num_tokens = tokenizer.vocabulary.num_tokens
        self._mask: bytes | None = None
        self._num_asked = 0

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        if self._mask is None:
            self._num_asked += 1
            if self._num_asked <= MAX_ASKED:
                return bool(self._matcher.validate_tokens([token_id]))
        mask = self._bits()
        if not mask or token_id >= self._num_tokens:
            return False
        return bool(mask[token_id >> 3] >> (token_id & 7) & 1)

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        if len(token_ids) == 1:
            return int(self.allows(token_ids[0]))
        return int(self._matcher.validate_tokens(list(token_ids)))

    def legal_among(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Return which of the tokens may come next."""
        import numpy as np

        mask = self._bits()
        if not mask:
            return np.zeros(len(token_ids), bool)
        known = np.minimum(token_ids, self._num_tokens - 1)
        bits = np.frombuffer(mask, np.uint8)[known >> 3] >> (known & 7) & 1
        found: NDArray[np.bool_] = (bits == 1) & (token_ids == known)
        return found

    def _bits(self) -> bytes:
        """Return a bit for each token, eight in a byte; b"" where none may follow. It is computed once.

        The bits of end tokens are 0.
        """
        if self._mask is None:
            bits = bytearray() if self._matcher.is_stopped() else self._computed_bits()
            self._check()
            self._mask = bytes(bits)
        return self._mask

    def _computed_bits(self) -> bytearray:
        bits = bytearray(self._matcher.compute_bitmask())
        for end_id in self._tokenizer.vocabulary.end_ids:
            bits[end_id >> 3] &= ~(1 << (end_id & 7))
        return bits

    def best_legal(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit; None where none is."""
        return best_legal(logits[: self._num_tokens], self._bits())

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        return legal_ids(self._bits(), self._num_tokens)

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        self._matcher.consume_token(token_id)
        self._mask, self._num_asked = None, 0
        self._check()
        self._written += self._tokenizer.vocabulary.bytes_of(token_id)

    def fork(self) -> GrammarConstraint:
        """Return an independent copy."""
        copy = self._matcher.deep_copy()
        return GrammarConstraint(
            self._tokenizer, copy, self._advice, self._written, self._place, self.extent
        )

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().partition("\n")[0]
            raise ConstraintFailed(
                f"the grammar cannot go on: {reason}; use a simpler schema or grammar"
            )

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_done(self) -> bool:
        """Whether no token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next."""
        return () if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what makes every answer longer than so many tokens; None where nothing is known to."""
        return self.extent.longer_than(max_tokens * self._tokenizer.vocabulary.longest)

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end, written as the tokenizer would write their text."""
        found = find_closing(self, 3 * max_tokens)
        if found is not None:
            found = self._as_written(found)
        if found is None or len(found) <= max_tokens:
            return found
        return find_closing(self, max_tokens)

    def near_closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end: those of the greedy way, where there is one."""
        found = find_greedy_closing(self)
        if found is None:
            return self.closing(max_tokens)
        found = self._as_written(found)
        return found if len(found) <= max_tokens else None

    def _as_written(self, closing: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens that the tokenizer writes the text of `closing` with, where they are fewer."""
        vocabulary = self._tokenizer.vocabulary
        written = tuple(vocabulary.encode(vocabulary.decode(closing)))
        return written if 0 < len(written) < len(closing) and self.ends(written) else closing

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens bring the answer to an end."""
        copy = self._matcher.deep_copy()
        return bool(copy.consume_tokens(list(token_ids))) and bool(copy.is_accepting())

    def closing_after(
        self, closing: Sequence[int], token_id: int, max_tokens: int
    ) -> Sequence[int] | None:
        """Return a way to the end behind `token_id`: the text of `closing`, or what is left of it.

        Where the complete text stays the same, it stays legal. Where the token leaves a JSON answer in the same
        containers, `closing` completes it again if it is legal: then nothing is appended to a copy, which takes ten
        times as long.
        """
        taken = self._tokenizer.vocabulary.bytes_of(token_id)
        rest: Sequence[int] | None = self._rest_of_text(closing, taken)
        if rest is None and self._completes(closing, token_id):
            rest = closing
        if rest is not None and len(rest) <= max_tokens:
            return rest
        return super().closing_after(closing, token_id, max_tokens)

    def _rest_of_text(self, closing: Sequence[int], taken: bytes) -> tuple[int, ...] | None:
        """Return tokens of what follows `taken` in the text of `closing`; None where the text begins otherwise."""
        vocabulary = self._tokenizer.vocabulary
        for index, token_id in enumerate(closing):
            piece = vocabulary.bytes_of(token_id)
            if piece and piece.startswith(taken):
                tail = piece[len(taken) :]
                spelled = self._tokenizer.spelled(tail) if len(tail) == 1 else ()
                spelled = spelled or tuple(vocabulary.encode(tail)) or self._tokenizer.spelled(tail)
                return (*spelled, *closing[index + 1 :]) if spelled or not tail else None
            if not piece or not taken.startswith(piece):
                return None
            taken = taken[len(piece) :]
        return None

    def _completes(self, closing: Sequence[int], token_id: int) -> bool:
        """Whether `closing`, which ended the answer before its last token, certainly does behind it."""
        if not self._advice.is_json:
            return False
        num_bytes = len(self._tokenizer.vocabulary.bytes_of(token_id))
        before = self._place.after(self._written[:-num_bytes])
        self._place = before.after(self._written)
        return self._place.is_like(before) and self.num_legal(closing) == len(closing)

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end: the same text without the token's, white space aside."""
        vocabulary = self._tokenizer.vocabulary
        taken = vocabulary.bytes_of(token_id)
        rest = self._rest_of_text(closing, taken.strip())
        if rest is not None and taken != taken.strip():
            yield rest
        for index, next_id in enumerate(
            closing[:MAX_LEFT_OUT]
        ):  # `0` of `0,"b":1}` where `7,` was written
            piece = vocabulary.bytes_of(next_id)
            if taken and index and piece.startswith(taken):
                tail = piece[len(taken) :]
                yield (*vocabulary.encode(tail), *closing[index + 1 :])
        yield closing

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield what the advice says, then the tokens of single bytes, those that end a JSON value first."""
        self._place = self._place.after(self._written)
        yield from map(self._tokenizer.spelled, self._advice.texts(self._written, self._place))
        yield from self._tokenizer.ends
