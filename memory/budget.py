"""Budget: how many bytes the process may have resident, and who said so."""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.memory.device import Machine
from lowtide.memory.units import format_bytes, parse_size

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
