"""What can go wrong with memory. Knows no model."""

from __future__ import annotations

from lowtide.memory.units import format_bytes, format_bytes_up
from lowtide.models.errors import LowtideError


class BadSize(LowtideError):
    """A size that cannot be read."""

    exit_code = 2


class OverBudget(LowtideError):
    """What was asked for cannot be done inside the budget; nothing was allocated.

    `needed_bytes` is the least that would do, `budget_bytes` what is allowed, `hint` what to change.
    """

    exit_code = 2

    def __init__(self, what: str, needed_bytes: int, budget_bytes: int, hint: str) -> None:
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.hint = hint
        super().__init__(
            f"{what} needs at least {format_bytes_up(needed_bytes)}, "
            f"{format_bytes(budget_bytes)} allowed: {hint}"
        )


class NotEnforceable(LowtideError):
    """The kernel cannot be made to hold the budget; nothing was loaded."""

    exit_code = 2


class KilledByLimit(LowtideError):
    """The kernel ended the process at its limit; what it had in memory is lost."""
