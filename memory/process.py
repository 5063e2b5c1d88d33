"""Resident memory of this process, now and at its peak, as the operating system counts it.

Resident file pages count in full, as in the maximum resident set size of `time -v`.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PEAK_NOISE_BYTES = 1 << 20
"""The kernel counts pages in batches for each thread, so that a peak may still move by so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Bytes of this process: resident now, at the peak, anonymous, of files; None means unknown."""

    resident_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None


def read_process_memory() -> ProcessMemory:
    """Read all counters. Cheap enough to call once per answer, not once per token.

    A peak of `not_charged_if_refused` is not counted.
    """
    return _charged(_read())


def _read() -> ProcessMemory:
    try:
        return _from_status(Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    except (OSError, KeyError, ValueError):
        return _from_psutil()


def read_peak_bytes() -> int:
    """Read the system's own peak of this process, refused opens included."""
    return _read().peak_bytes


@dataclass
class _RefusedPeak:
    """The peak that a refused open reached, and the highest that was seen outside of it."""

    peak_bytes: int
    counted_bytes: int


_refused: _RefusedPeak | None = None


@contextlib.contextmanager
def not_charged_if_refused() -> Iterator[None]:
    """Do not count the peak of this block afterwards if it ends with an error, since nothing of it remains.

    The system has one peak for the life of a process. Without this, a model that was refused under a large
    budget would have every later one refused under a smaller budget.
    """
    global _refused
    before = read_process_memory()
    try:
        yield
    except Exception:
        after = _read()
        if after.peak_bytes > before.peak_bytes:
            _refused = _RefusedPeak(after.peak_bytes, before.peak_bytes)
        raise


def _charged(memory: ProcessMemory) -> ProcessMemory:
    refused = _refused
    if refused is None or memory.peak_bytes > refused.peak_bytes + PEAK_NOISE_BYTES:
        return memory
    refused.counted_bytes = max(refused.counted_bytes, memory.resident_bytes)
    return replace(memory, peak_bytes=refused.counted_bytes)


def read_resident_bytes() -> int:
    """Read the resident set alone, in 10 to 20 microseconds on Linux; off by a few pages per processor."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return _from_psutil().resident_bytes


def _from_status(text: str) -> ProcessMemory:
    kilobytes = {
        key: int(value.split()[0])
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    }
    return ProcessMemory(
        resident_bytes=kilobytes["VmRSS"] << 10,
        peak_bytes=kilobytes["VmHWM"] << 10,
        anonymous_bytes=kilobytes["RssAnon"] << 10,
        file_bytes=kilobytes["RssFile"] << 10,
    )


def _from_psutil() -> ProcessMemory:
    import psutil

    memory = psutil.Process().memory_info()
    resident = int(memory.rss)  # the working set on Windows
    return ProcessMemory(
        resident_bytes=resident,
        peak_bytes=max(resident, _peak_bytes(memory)),
        anonymous_bytes=None,
        file_bytes=None,
    )


def _peak_bytes(memory: Any) -> int:
    """Return the most that was resident; `memory` is psutil's, which has the peak on Windows alone."""
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
