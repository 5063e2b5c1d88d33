"""KVReservation: a KV cache's bytes are reserved before its tokens come. Knows no tokens but their number."""

from __future__ import annotations

from collections.abc import Callable

from lowtide.memory.budget import Ledger
from lowtide.memory.plan.estimates import KV_PADDING
from lowtide.memory.plan.line import CACHE


class KVReservation:
    """Lets a cache grow beyond what was planned for it, while the ledger has room.

    `planned_tokens` are reserved for good; `bytes_of` returns what the cache's `component` holds for a number
    of tokens.
    """

    def __init__(
        self,
        ledger: Ledger,
        planned_tokens: int,
        bytes_of: Callable[[int], int],
        component: str = CACHE,
    ) -> None:
        self._component = component
        self._ledger = ledger
        self._planned_tokens = planned_tokens
        self._admitted_tokens = planned_tokens
        self._bytes_of = bytes_of

    def most_tokens(self, limit: int) -> int:
        """Return how many tokens, up to `limit`, the ledger has room for now."""
        free_bytes = self._ledger.budget_bytes - self._ledger.reserved_bytes
        room_bytes = free_bytes + self._bytes_of(self._admitted_tokens)
        most = self._planned_tokens
        while most < limit and self._bytes_of(most + KV_PADDING) <= room_bytes:
            most += KV_PADDING
        return min(most, limit)

    def admit(self, num_tokens: int) -> None:
        """Reserve what `num_tokens` take in all.

        Raises `OverBudget`, and changes nothing, where that is too much.
        """
        wanted = max(num_tokens, self._planned_tokens)
        if wanted == self._admitted_tokens:
            return
        self._ledger.reserve(self._component, self._bytes_of(wanted))
        self._admitted_tokens = wanted
