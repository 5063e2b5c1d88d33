"""QueueFigures: how busy a runtime is, for the metrics of a server; and what counts them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

WINDOW_S = 10.0
"""Seconds over which tokens a second are counted."""
NEW_SHARE = 0.2
"""Weight of the last answer in the mean time of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFigures:
    """The submitted answers of a runtime at one moment."""

    running: int
    """Answers that are computed, or whose prompt is read."""
    waiting: int
    """Answers that wait for a place or for room in the KV cache."""
    sequences: int
    """How many answers may run together."""
    max_waiting: int
    """How many may wait before `submit` raises `QueueFull`."""
    tokens_per_s: float
    """Tokens of all answers in the last 10 seconds, each second."""
    retry_after_s: float | None
    """Seconds until a further answer may begin; None where no answer has ended yet."""

    def to_dict(self) -> dict[str, Any]:
        """Return all figures for JSON."""
        return asdict(self)


class QueueMeter:
    """Counts the tokens and the time of answers. Used by one thread, read by any."""

    def __init__(self) -> None:
        self._counted: deque[tuple[float, int]] = deque()
        self._answer_s: float | None = None

    def add_tokens(self, num_tokens: int) -> None:
        """Count the tokens of a pass."""
        now = time.monotonic()
        self._counted.append((now, num_tokens))
        while self._counted[0][0] < now - WINDOW_S:
            self._counted.popleft()

    def add_answer(self, seconds: float) -> None:
        """Count an answer that has ended, and the time that it ran."""
        if self._answer_s is None:
            self._answer_s = seconds
        self._answer_s += NEW_SHARE * (seconds - self._answer_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens each second, of the last seconds in which any came."""
        now = time.monotonic()
        recent = [(at, number) for at, number in list(self._counted) if at >= now - WINDOW_S]
        if not recent:
            return 0.0
        return sum(number for _, number in recent) / max(now - recent[0][0], 1.0)

    def retry_after_s(self, waiting: int, sequences: int) -> float | None:
        """Return when a further answer may begin behind those that wait; None where that is unknown."""
        if self._answer_s is None:
            return None
        return self._answer_s * (waiting + 1) / sequences
