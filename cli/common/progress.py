"""The bar that shows how far a repacked copy is: on a terminal, and only where it takes longer than a second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lowtide import Profiler, Runtime
    from lowtide.runtime.planning.plan import ResolvedModel

SHOWN_AFTER_S = 1.0


class RepackingBar:
    """A bar of `num_bytes` on stderr that appears `SHOWN_AFTER_S` after the first of them."""

    def __init__(self, label: str, num_bytes: int) -> None:
        self._label, self._num_bytes = label, num_bytes
        self._started_s: float | None = None
        self._done_bytes = 0
        self._bar: Any = None

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more."""
        now_s = time.monotonic()
        if self._started_s is None:
            self._started_s = now_s
        self._done_bytes += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif now_s - self._started_s >= SHOWN_AFTER_S and sys.stderr.isatty():
            self._bar = click.progressbar(
                length=self._num_bytes, label=self._label, file=sys.stderr
            )
            self._bar.update(self._done_bytes)

    def close(self) -> None:
        """End the line of the bar, if it was shown."""
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None


def load_runtime(planned: ResolvedModel, profiler: Profiler | None = None) -> Runtime:
    """Load a planned model, and show how far its repacked copy is where one is made."""
    from lowtide import Runtime

    bar = RepackingBar(f"Repacking {planned.spec.name}", planned.spec.weight_bytes)
    try:
        return Runtime.load(planned, profiler, bar.advance)
    finally:
        bar.close()
