"""Which CPUs to compute on: one of each core, and none of the cores that are much slower than the fastest.

Hyperthreads share the units that multiply, so a second thread on a core computes nothing more. Threads that wait for
one another are as fast as the slowest: a core of less than half the speed would hold the others up.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
SLOW = 0.5
"""Cores below this share of the fastest one's capacity are left to others."""


def computing_cpus(cpus: Set[int], folder: Path = CPUS) -> set[int]:
    """Return one of `cpus` for each fast core; all of them where the system does not describe its cores."""
    cores: dict[str, int] = {}
    for cpu in sorted(cpus):
        cores.setdefault(_text(folder, cpu, "topology/thread_siblings_list") or str(cpu), cpu)
    first_of_each = set(cores.values())
    capacities = {cpu: _capacity(folder, cpu) for cpu in first_of_each}
    fastest = max((c for c in capacities.values() if c is not None), default=0)
    return {
        cpu
        for cpu, capacity in capacities.items()
        if capacity is None or capacity >= SLOW * fastest
    }


def _capacity(folder: Path, cpu: int) -> int | None:
    """Return the speed that the kernel gives a CPU (1024 for the fastest), None where it does not say."""
    text = _text(folder, cpu, "cpu_capacity")
    return int(text) if text.isdigit() else None


def _text(folder: Path, cpu: int, name: str) -> str:
    try:
        return (folder / f"cpu{cpu}" / name).read_text().strip()
    except (OSError, ValueError):
        return ""
