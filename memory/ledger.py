"""Ledger: bytes are reserved here before anything is allocated. Knows no owner's insides."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

from lowtide.memory.errors import OverBudget


class Ledger:
    """What each owner has reserved; the sum never passes the budget. Safe between threads."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._reserved: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """The sum over all owners."""
        return sum(self._reserved.values())

    @property
    def owners(self) -> Mapping[str, int]:
        """Bytes by owner, read only."""
        return MappingProxyType(dict(self._reserved))

    def reserve(self, owner: str, num_bytes: int) -> None:
        """Set what `owner` may hold to `num_bytes`, more or less than before.

        Raises `OverBudget`, and changes nothing, where the sum would pass the budget.
        """
        if num_bytes < 0:
            raise ValueError(f"{owner} reserves {num_bytes} bytes, 0 or more is wanted")
        with self._lock:
            others = self.reserved_bytes - self._reserved.get(owner, 0)
            if others + num_bytes > self.budget_bytes:
                raise OverBudget(
                    f"{owner}, with what is reserved already,",
                    others + num_bytes,
                    self.budget_bytes,
                    "raise --memory or ask for less",
                )
            self._reserved[owner] = num_bytes

    def release(self, owner: str) -> None:
        """Give back what `owner` has reserved; nothing where it has nothing."""
        with self._lock:
            self._reserved.pop(owner, None)
