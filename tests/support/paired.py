"""Time two variants alternately, so that their ratio is right even if the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def paired(
    benchmark: Any,
    name: str,
    measured: Callable[[], Any],
    peers: Callable[[], Any],
    rounds: int,
    peer: str = "llama.cpp",
    pause_s: float = 0.0,
) -> None:
    """Run the peers and `measured` `rounds` times in turn after one warm-up; print and keep the median ratio.

    Before each it pauses for `pause_s`: a peer's threads may spin for a while after its work.
    """
    peer_seconds: list[float] = []
    own_seconds: list[float] = []

    def timed(work: Callable[[], Any], seconds: list[float]) -> None:
        time.sleep(pause_s)
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(
        lambda: timed(measured, own_seconds),
        setup=lambda: timed(peers, peer_seconds),
        rounds=rounds,
        warmup_rounds=1,
    )
    ratios = [p / o for p, o in zip(peer_seconds[1:], own_seconds[1:], strict=True)]
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(ratio=ratio, peer_median_s=statistics.median(peer_seconds[1:]))
    print(
        f"\n{name}: {ratio:.3f} x {peer} (median of {rounds} pairs, {min(ratios):.3f} to "
        f"{max(ratios):.3f}); lowtide {statistics.median(own_seconds[1:]) * 1000:.1f} ms, "
        f"{peer} {statistics.median(peer_seconds[1:]) * 1000:.1f} ms"
    )
