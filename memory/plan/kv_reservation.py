"""KVReservation: reserves a KV cache's bytes in the ledger before its tokens are computed."""

from __future__ import annotations

from collections.abc import Callable

from lowtide.memory.budget import Ledger
from lowtide.memory.plan.estimates import KV_PADDING
from lowtide.memory.plan.line import CACHE


class KVReservation:
    """Lets a KV cache grow beyond its planned size while the ledger has room.

    `planned_tokens` stay reserved; `bytes_of(num_tokens)` returns the bytes that the cache's `component`
    needs for that many tokens.
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
        """Return how many tokens, at most `limit`, the ledger has room for now."""
        free_bytes = self._ledger.budget_bytes - self._ledger.reserved_bytes
        room_bytes = free_bytes + self._bytes_of(self._admitted_tokens)
        low, high = 0, max(-(-(limit - self._planned_tokens) // KV_PADDING), 0) + 1
        while high - low > 1:  # steps of the padding beyond the planned tokens
            middle = (low + high) // 2
            if self._bytes_of(self._planned_tokens + middle * KV_PADDING) <= room_bytes:
                low = middle
            else:
                high = middle
        return min(self._planned_tokens + low * KV_PADDING, limit)

    def admit(self, num_tokens: int) -> None:
        """Reserve the bytes of `num_tokens` in total.

        Raises `OverBudget`, and changes nothing, if the ledger has no room.
        """
        admitted = max(num_tokens, self._planned_tokens)
        if admitted == self._admitted_tokens:
            return
        self._ledger.reserve(self._component, self._bytes_of(admitted))
        self._admitted_tokens = admitted
