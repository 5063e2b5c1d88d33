"""Budget: how many bytes the process may have resident, and who said so.

Ledger: bytes are reserved here before anything is allocated. Knows no owner's insides."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowtide.memory.machine import Machine
from lowtide.memory.units import OverBudget, format_bytes, parse_size

DEFAULT_SHARE = 0.8
WATCHED_SHARE = 0.95
"""Of a budget: when more is resident, what can be spared is given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limit on the process's peak resident set; `source` says where it comes from."""

    num_bytes: int
    source: str
    warning: str | None = None

    @classmethod
    def stated(cls, memory: str | int | None, machine: Machine) -> Budget:
        """Return the budget that the user stated, or 80 % of what the machine has available.

        A percentage is of the available memory. Raises `BadSize` where `memory` is no size.
        """
        if memory is None:
            return cls(
                num_bytes=int(machine.available_bytes * DEFAULT_SHARE),
                source=f"80 % of the {format_bytes(machine.available_bytes)} available",
            )
        num_bytes = parse_size(memory, whole_bytes=machine.available_bytes)
        warning = None
        if num_bytes > machine.available_bytes:
            warning = (
                f"the budget of {format_bytes(num_bytes)} is above the "
                f"{format_bytes(machine.available_bytes)} that this machine has available"
            )
        return cls(num_bytes=num_bytes, source=f"stated: {memory}", warning=warning)


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
    def components(self) -> Mapping[str, int]:
        """Bytes by owner, read only."""
        return MappingProxyType(dict(self._reserved))

    def reserve(self, component: str, num_bytes: int) -> None:
        """Set what `component` may hold to `num_bytes`, more or less than before.

        Raises `OverBudget`, and changes nothing, where the sum would pass the budget.
        """
        if num_bytes < 0:
            raise ValueError(f"{component} reserves {num_bytes} bytes, 0 or more is wanted")
        with self._lock:
            others = self.reserved_bytes - self._reserved.get(component, 0)
            if others + num_bytes > self.budget_bytes:
                raise OverBudget(
                    f"{component}, with what is reserved already,",
                    others + num_bytes,
                    self.budget_bytes,
                    "raise --memory or ask for less",
                )
            self._reserved[component] = num_bytes

    def release(self, component: str) -> None:
        """Give back what `component` has reserved; nothing where it has nothing."""
        with self._lock:
            self._reserved.pop(component, None)
