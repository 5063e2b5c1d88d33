"""Budget: how many bytes the process may have resident. Ledger: bytes reserved against a budget.

Every allocation that a plan names is reserved in the ledger before it is made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowtide.memory.machine import Machine
from lowtide.memory.units import OverBudget, format_bytes, parse_size
from lowtide.models.arguments.names import option

DEFAULT_SHARE = 0.8
"""Share of the available memory that is the budget when the user sets none."""
WATCHED_SHARE = 0.95
"""Share of the budget above which memory that nobody needs is released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limit on the process's peak resident set in bytes; `source` says where the limit comes from."""

    num_bytes: int
    source: str
    warning: str | None = None

    @classmethod
    def from_user(cls, memory: str | int | None, machine: Machine) -> Budget:
        """Return the budget that the user asked for, or 80 % of the machine's available memory.

        A percentage refers to the available memory. Raises `BadSize` if `memory` is not a size.
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
                f"the budget of {format_bytes(num_bytes)} is larger than the "
                f"{format_bytes(machine.available_bytes)} of memory that this machine has available"
            )
        return cls(num_bytes=num_bytes, source=f"set to {memory}", warning=warning)


class Ledger:
    """Bytes that each component has reserved; their sum never exceeds the budget. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._reserved: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """The sum over all components."""
        return sum(self._reserved.values())

    @property
    def components(self) -> Mapping[str, int]:
        """Reserved bytes by component, read only."""
        return MappingProxyType(dict(self._reserved))

    def reserve(self, component: str, num_bytes: int) -> None:
        """Set the reservation of `component` to `num_bytes`; it replaces an earlier one.

        Raises `OverBudget`, and changes nothing, if the sum would exceed the budget.
        """
        if num_bytes < 0:
            raise ValueError(f"{component} reserves {num_bytes} bytes; it must be 0 or more")
        with self._lock:
            others = self.reserved_bytes - self._reserved.get(component, 0)
            if others + num_bytes > self.budget_bytes:
                raise OverBudget(
                    f"{component}, with the memory reserved before it,",
                    others + num_bytes,
                    self.budget_bytes,
                    f"raise {option('memory')} or ask for less",
                )
            self._reserved[component] = num_bytes

    def release(self, component: str) -> None:
        """Remove the reservation of `component`; does nothing if there is none."""
        with self._lock:
            self._reserved.pop(component, None)
