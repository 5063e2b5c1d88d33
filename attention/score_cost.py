"""ScoreCost: what scores cost where keys behind a window are states, and what that saved."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScoreCost:
    """Sums over passes, for the last row of each, over all layers that saw states.

    A channel of a key is counted once, for all query heads that it is multiplied with: `channels_held` of
    all keys that were seen, `channels_behind` of those seen as states, of which `channels_sent` were sent;
    `channels_multiplied` is what was multiplied, of the window and of opened keys, too; what each key adds
    up, one product a block, is not counted. `key_bytes_held` are those keys in the cache,
    `key_bytes_read` what was read in their place, with which keys are alike.
    """

    channels_held: int = 0
    channels_behind: int = 0
    channels_sent: int = 0
    channels_multiplied: int = 0
    key_bytes_held: int = 0
    key_bytes_read: int = 0

    def __sub__(self, other: ScoreCost) -> ScoreCost:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return ScoreCost(*(mine - theirs for mine, theirs in pairs))

    @property
    def sparsity(self) -> float:
        """The share of multiplications skipped behind the window: DeltaLLM's definition."""
        return 1 - self.channels_sent / self.channels_behind if self.channels_behind else 0.0

    @property
    def skipped(self) -> float:
        """The share of all multiplications of scores that was skipped."""
        return 1 - self.channels_multiplied / self.channels_held if self.channels_held else 0.0

    @property
    def key_bytes_skipped(self) -> int:
        """Bytes of keys that were not read; below 0 where of single channels little is skipped."""
        return self.key_bytes_held - self.key_bytes_read

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "sparsity": round(self.sparsity, 4),
            "skipped": round(self.skipped, 4),
            "key_bytes_held": self.key_bytes_held,
            "key_bytes_read": self.key_bytes_read,
        }

    def __str__(self) -> str:
        behind = f"{self.sparsity:.0%} behind the window"
        return f"{self.skipped:.0%} of the score multiplications skipped ({behind})"


NO_COST = ScoreCost()
