"""The machine: processor, cores, and how much memory it or the surrounding container has."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.memory.os.cores import computing_cpus
from lowtide.memory.os.cpu_quota import cpu_quota

PROC = Path("/proc")
CGROUP_ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""cgroup v1 reports a number near 2^63 for "no limit"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The hardware, as far as the surrounding container may use it.

    `total_bytes` and `available_bytes` respect a container's limit; `limited_by` then names it. `cores` is how
    many CPUs this process may keep busy; `cpu_quota` is the container's limit on CPU time in CPUs, None without
    one.
    """

    system: str
    processor: str
    cores: int
    total_bytes: int
    available_bytes: int
    limited_by: str | None
    cpu_quota: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """A control group's memory limit, and its usage without page cache that can be dropped."""

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """How many bytes the group may still allocate."""
        return max(self.limit_bytes - self.used_bytes, 0)


def read_machine() -> Machine:
    """Read the hardware, and a container's limits from its control groups."""
    total, available = _memory_bytes(PROC / "meminfo")
    limited_by = None
    for group in cgroup_limits(PROC, CGROUP_ROOT):
        if group.limit_bytes < total:
            total, limited_by = group.limit_bytes, "cgroup"
        available = min(available, group.free_bytes)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        processor=_processor_name(),
        cores=usable_cores(),
        total_bytes=total,
        available_bytes=available,
        limited_by=limited_by,
        cpu_quota=cpu_quota(PROC, CGROUP_ROOT),
    )


def _memory_bytes(meminfo: Path) -> tuple[int, int]:
    """Return the machine's memory, and what of it is available, in bytes: as Linux says it, or else psutil."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        kibibytes = {
            name: int(value.split()[0])
            for name, _, value in (line.partition(":") for line in lines)
        }
        return kibibytes["MemTotal"] << 10, kibibytes["MemAvailable"] << 10
    except (OSError, ValueError, KeyError, IndexError):  # another system, or a Linux before 3.14
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)


def usable_cores() -> int:
    """Return how many cores this process may keep busy, by affinity and by its containers' quota; at least 1.

    Hyperthreads of one core count once, and cores that are much slower than the others do not count. A quota is
    rounded down: a thread more would wait for the others in every layer.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
    cores = len(computing_cpus(affinity(0))) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota(PROC, CGROUP_ROOT)
    return cores if quota is None else max(min(cores, int(quota)), 1)


def cgroup_limits(proc: Path, root: Path) -> list[CgroupMemory]:
    """Return the memory limits of this process's control group and of its ancestors.

    Version 2 has one hierarchy with memory.max; version 1 has a memory controller with
    memory.limit_in_bytes. Page cache that can be dropped does not count as used.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[CgroupMemory] = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            groups += _walk(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            groups += _walk(
                root / "memory",
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
    return groups


def _walk(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[CgroupMemory]:
    parts = Path(path.lstrip("/")).parts
    # Inside a container the path is often the host's; then only the root itself exists.
    folders = [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    groups = []
    for folder in folders:
        limit_bytes = _number(folder / limit)
        if limit_bytes is None or limit_bytes >= UNLIMITED:
            continue
        used = (_number(folder / usage) or 0) - _stat(folder / "memory.stat", reclaimable)
        groups.append(CgroupMemory(limit_bytes, max(used, 0)))
    return groups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # "max" means no limit
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(values.get(key, "0"))


def _processor_name() -> str:
    try:
        for line in (PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
