"""QualityChoice: which policy the option `quality` took, and how far it is from exact answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.attention.policy import CalibratedPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityChoice:
    """What was chosen for a quality, in a sentence; `found` is None where attention stays exact.

    `time_share` is the predicted time as a share of that of exact attention.
    """

    quality: str
    sentence: str
    found: CalibratedPolicy | None = None
    time_share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the choice for JSON."""
        found = self.found
        return {
            "quality": self.quality,
            "policy": None if found is None else str(found.policy),
            "distance": None if found is None else found.distance,
            "kl": None if found is None else found.kl,
            "predicted_time_share": round(self.time_share, 3),
            "sentence": self.sentence,
        }
