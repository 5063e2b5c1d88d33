"""How many threads compute a forward pass, chosen before each: as many as the cores that others leave.

A thread more than there are cores for makes a pass slower, not faster: it takes turns with the others, and those that
wait for one another in every node of a graph are as slow as the one that has lost its core. While a number is wrong
for a moment, lowtide's kernels wait for no helper that is away (`attention/native/team.h`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

DECODED_TOKENS = 16
"""Passes of fewer tokens than this are those of decoding and of verifying drafts."""


class OtherThreads(Protocol):
    """Where the number of others' threads comes from (`memory.os.busy.OtherWork`)."""

    def threads(self) -> int:
        """Return how many threads of others compete for the cores."""

    def close(self) -> None:
        """Free what it needs."""


@dataclass(frozen=True, slots=True)
class PassThreads:
    """The threads of a pass: those that the engine starts for every node, and those that help in lowtide's nodes."""

    engine: int
    helped: int = 1

    @property
    def count(self) -> int:
        """All of them; one is the same in both."""
        return max(self.engine, self.helped)


class ThreadChooser:
    """Chooses the threads of each pass and sets them with `apply`.

    With `has_team` lowtide's kernels compute all large nodes, on threads of their own; `settle` waits until none of
    these reads memory of an earlier graph, which another number of tokens may replace. Without `others` the number
    stays `num_threads`. `fixed_from` is the number of tokens in the cache from which the results of a pass of one token
    depend on the number of threads, so that it must not change; None: they never do.
    """

    def __init__(
        self,
        num_threads: int,
        apply: Callable[[PassThreads], None],
        *,
        has_team: bool = False,
        settle: Callable[[], None] = lambda: None,
        others: OtherThreads | None = None,
        fixed_from: int | None = None,
    ) -> None:
        self._num_threads = num_threads
        self._apply = apply
        self._has_team = has_team
        self._settle = settle
        self._num_tokens = 0
        self._others = others
        self._fixed_from = fixed_from
        self.current = PassThreads(num_threads)
        """Of the last pass."""

    def begin_pass(self, num_tokens: int, num_cached: int) -> None:
        """Choose for a pass of `num_tokens` behind `num_cached` others in the cache."""
        if num_tokens != self._num_tokens:
            self.settle()
            self._num_tokens = num_tokens
        chosen = self._choose(num_tokens, num_cached)
        if chosen != self.current:
            self._apply(chosen)
            self.current = chosen

    def _choose(self, num_tokens: int, num_cached: int) -> PassThreads:
        most = self._num_threads
        others = self._others.threads() if self._others is not None and most > 1 else 0
        is_fixed = self._fixed_from is not None and num_cached + num_tokens > self._fixed_from
        count = most if is_fixed else max(most - others, 1)
        if self._has_team and num_tokens < DECODED_TOKENS:
            return PassThreads(1, count)
        return PassThreads(count)

    def settle(self) -> None:
        """Wait until no helper reads memory of earlier graphs."""
        self._settle()

    def close(self) -> None:
        """Free what it needs."""
        self.settle()
        if self._others is not None:
            self._others.close()
