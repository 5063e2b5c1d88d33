"""PlanRow: one line of a plan, in the process's memory or in a device's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One owner's bytes and the reason for them."""

    owner: str
    num_bytes: int
    why: str

    def to_dict(self) -> dict[str, str | int]:
        """Return the row for JSON."""
        return {"owner": self.owner, "bytes": self.num_bytes, "why": self.why}
