"""Errors of serving."""

from __future__ import annotations

from lowtide.models.errors import LowtideError


class QueueFull(LowtideError):
    """As many requests wait as may; `retry_after_s` is when there may be room."""

    def __init__(self, num_waiting: int, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{num_waiting} requests wait for the model already, which is as many as may: ask again in about "
            f"{max(retry_after_s, 1):.0f} s"
        )
