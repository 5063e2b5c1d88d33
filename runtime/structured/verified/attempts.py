"""Attempts: answers that are verified when they are complete, and tried again where they were wrong.

The text that no later attempt may begin with is known: the first value that was wrong, up to its end. The trie of
grammar-aligned decoding with approximate expected futures (ASAp, Park et al. 2024, arXiv 2405.21047) makes it likely
that an attempt leaves the ways that failed early: a token is weighted by the share of its continuations that are not
known to fail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.structured.closing import find_closing
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.verified.validator import Violation

if TYPE_CHECKING:
    from lowtide.models.model import Logits
    from lowtide.runtime.structured.constraint import TokenIds

MAX_ATTEMPTS = 16
"""Most answers that are tried for one."""
MAX_TOKEN_BYTES = 256
"""Longer tokens are white space or dashes, which end no value."""
LEAST_SHARE = 1e-9
"""A token whose known continuations all failed stays possible: others may be legal."""
Check = Callable[[bytes], Violation | None]


@dataclass(slots=True)
class Node:
    """A prefix that an attempt had: the probability of each token that followed, and what followed that."""

    children: dict[int, tuple[float, Node]] = field(default_factory=dict)
    is_dead: bool = False

    def share(self) -> float:
        """Return an upper bound of the probability that a continuation is valid."""
        if self.is_dead:
            return 0.0
        lost = sum(chance * (1 - node.share()) for chance, node in self.children.values())
        return max(1.0 - lost, 0.0)


@dataclass(slots=True)
class Failures:
    """What earlier attempts at one answer did wrong; texts are without the white space between values."""

    root: Node = field(default_factory=Node)
    starts: list[bytes] = field(default_factory=list)
    """Texts that no answer may begin with."""
    whole: set[bytes] = field(default_factory=set)
    """Texts that are no answer, but may go on."""
    num_attempts: int = 1

    def add(self, text: bytes, violation: Violation) -> bytes | None:
        """Note what is wrong with an answer; return the start that no answer may have now, None for none."""
        ended = violation.end + (text[violation.end - 1 : violation.end].isdigit())
        if ended > len(text):  # a number at the end could go on
            self.whole.add(bare(text))
            return None
        self.starts.append(bare(text[:ended]))
        return self.starts[-1]

    def forbids(self, text: bytes) -> bool:
        """Whether no answer may begin with a text, given without white space between values."""
        return any(text.startswith(start) for start in self.starts)


_STRING_OR_SPACE = re.compile(rb'("(?:[^"\\]|\\.|\\$)*(?:"|$))|[ \t\r\n]+', re.DOTALL)


def bare(text: bytes) -> bytes:
    """Return JSON, which may end anywhere, without the white space between its values."""
    return _STRING_OR_SPACE.sub(lambda found: found[1] or b"", text)


_Path = Any
"""The path before the last token, the token with its probability, and the bare text behind it; None at the start."""


class Attempt(Constraint):
    """One attempt at an answer in the grammar of `inner` that `check` finds no violation in.

    `bytes_of` returns the bytes of a token.
    """

    def __init__(
        self,
        inner: Constraint,
        check: Check,
        bytes_of: Callable[[int], bytes],
        failures: Failures | None = None,
    ) -> None:
        self._start, self._inner = inner, inner.fork()
        self._check, self._bytes_of = check, bytes_of
        self._failures = failures or Failures()
        self._written = self._bare = b""
        self._node: Node | None = self._failures.root
        self._path: _Path = None
        self._logits: Logits | None = None

    def fork(self) -> Attempt:
        """Return an independent copy, which shares what failed."""
        copy = Attempt(self._start, self._check, self._bytes_of, self._failures)
        copy._inner = self._inner.fork()
        copy._written, copy._bare = self._written, self._bare
        copy._node, copy._path, copy._logits = self._node, self._path, self._logits
        return copy

    def _is_forbidden(self, token_id: int) -> bool:
        """Whether the answer would begin with a text that failed, or put off doing so by white space."""
        text = bare(self._written + self._bytes_of(token_id))
        return self._failures.forbids(text) or (self._is_near() and text == self._bare)

    def _is_near(self) -> bool:
        """Whether one token may lead to a text that failed."""
        size = len(self._bare) + MAX_TOKEN_BYTES
        starts = self._failures.starts
        return any(len(start) <= size and start.startswith(self._bare) for start in starts)

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return self._inner.allows(token_id) and not (
            self._is_near() and self._is_forbidden(token_id)
        )

    def num_legal(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may come one after the other."""
        count = self._inner.num_legal(token_ids)
        if not self._failures.starts:
            return count
        text = self._written
        for i, token_id in enumerate(token_ids[:count]):
            text += self._bytes_of(token_id)
            if self._failures.forbids(bare(text)):
                return i
        return count

    def legal_ids(self) -> TokenIds:
        """Return all tokens that may come next."""
        found = self._inner.legal_ids()
        if self._is_near():
            found = found[[not self._is_forbidden(token_id) for token_id in found.tolist()]]
        return found

    def advance(self, token_id: int) -> None:
        """Append a token that is allowed."""
        self._inner.advance(token_id)
        self._written += self._bytes_of(token_id)
        self._bare = bare(self._written)
        self._path = (self._path, token_id, _chance(self._logits, token_id), self._bare)
        self._logits = None
        if self._node is not None:
            self._node = self._node.children.get(token_id, (0.0, None))[1]

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._inner.is_accepting and self._bare not in self._failures.whole

    def forced(self) -> Sequence[int]:
        """Return the tokens of the text that must come next."""
        return self._inner.forced()

    @property
    def needs_logits(self) -> bool:
        """The trie holds the probability of every token."""
        return True

    def rests(self, closing: Sequence[int], token_id: int) -> Iterable[Sequence[int]]:
        """Yield ways that may still lead to the end."""
        return self._inner.rests(closing, token_id)

    def likely_next(self) -> Iterable[Sequence[int]]:
        """Yield tokens that tend to lead to the end."""
        return self._inner.likely_next()

    def why_longer(self, max_tokens: int) -> str | None:
        """Return what makes every answer longer than so many tokens."""
        return self._inner.why_longer(max_tokens)

    def closing(self, max_tokens: int) -> Sequence[int] | None:
        """Return tokens that bring the answer to an end that did not fail yet."""
        found = self._inner.closing(max_tokens)
        if found is None or self.ends(found):
            return found
        return find_closing(self, max_tokens)

    def checked_closing(self, closing: Sequence[int], max_tokens: int) -> Sequence[int]:
        """Return tokens that bring the answer to a valid end, `closing` where a few searches find none."""
        found: Sequence[int] | None = closing
        for _ in range(MAX_ATTEMPTS):
            if found is None:
                break
            text = self._written + b"".join(map(self._bytes_of, found))
            violation = self._check(text)
            if violation is None:
                return found
            start = self._failures.add(text, violation)
            if start is not None and self._bare.startswith(start):
                break  # wrong already, whatever follows
            found = self.closing(max_tokens)
        return closing

    def weigh(self, logits: Logits) -> Logits:
        """Return the logits with each token's share of continuations that are not known to fail."""
        self._logits = logits
        if self._node is None or not self._node.children:
            return logits
        weighed = logits.copy()
        for token_id, (_, node) in self._node.children.items():
            weighed[token_id] += math.log(max(node.share(), LEAST_SHARE))
        return weighed

    @property
    def enforced(self) -> str:
        """The answer is checked when it is complete."""
        return "verified"

    @property
    def num_attempts(self) -> int:
        """How many answers were tried, with this one."""
        return self._failures.num_attempts

    def retry(self) -> Attempt | None:
        """Return another attempt where this answer is wrong; raises `ConstraintFailed` after the most attempts."""
        failures = self._failures
        violation = None if not self.is_accepting else self._check(self._written)
        if self.is_accepting and violation is None:
            return None
        reason = violation.reason if violation else "it cannot be completed"
        if failures.num_attempts >= MAX_ATTEMPTS:
            raise ConstraintFailed(
                f"none of {MAX_ATTEMPTS} answers follows the schema (the last one: {reason}); change the prompt or "
                "the schema"
            )
        failures.num_attempts += 1
        if violation is None:
            failures.starts.append(self._bare)
        else:
            failures.add(self._written, violation)
        self._add_dead_ends()
        if failures.starts:
            self._remember(failures.starts[-1])
        return Attempt(self._start, self._check, self._bytes_of, failures)

    def _add_dead_ends(self) -> None:
        """Forbid the shorter texts, too, after which nothing else but what failed can follow."""
        path, failures = self._path, self._failures
        while path is not None:
            path = path[0]
            prefix = Attempt(self._start, self._check, self._bytes_of, failures)
            for token_id in _tokens(path):
                prefix.advance(token_id)
            if not failures.forbids(prefix._bare) and failures.starts[-1:]:
                if not failures.starts[-1].startswith(prefix._bare):
                    return
                if prefix.is_accepting or len(prefix.legal_ids()):
                    return
                failures.starts.append(prefix._bare)

    def _remember(self, start: bytes) -> None:
        """Add the tokens of this attempt to the trie, up to those that completed `start`."""
        steps = []
        path = self._path
        while path is not None:
            path, token_id, chance, text = path
            steps.append((token_id, chance, text))
        node = self._failures.root
        for token_id, chance, text in reversed(steps):
            node = node.children.setdefault(token_id, (chance, Node()))[1]
            if text.startswith(start):
                node.is_dead = True
                return


def _tokens(path: _Path) -> list[int]:
    """Return the tokens of a path."""
    found = []
    while path is not None:
        path, token_id, _, _ = path
        found.append(token_id)
    return found[::-1]


def _chance(logits: Logits | None, token_id: int) -> float:
    """Return the probability of a token at temperature 1; 0 where no model chose it."""
    if logits is None:
        return 0.0
    import numpy as np

    largest = float(logits.max())
    return math.exp(float(logits[token_id]) - largest) / float(np.exp(logits - largest).sum())
