"""The CPU quota of a container: how many CPUs' worth of time its control groups allow.

Affinity says which CPUs a process may run on. A quota says for how long in each period. More threads than the
quota allows are stopped together in the middle of a period, while those of ggml wait for each other: with two
threads in half a CPU a token takes four times as long as with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

V2_FOLDERS = ("", "unified")
"""Where version 2 is mounted: alone, and beside version 1."""


def cpu_quota(proc: Path, root: Path) -> float | None:
    """Return the smallest quota, in CPUs, of this process's control groups and their ancestors; None for none.

    Version 2 states it in cpu.max ("50000 100000": microseconds in each period of so many), version 1 in
    cpu.cfs_quota_us and cpu.cfs_period_us. `proc` and `root` are where the two file systems are mounted.
    """
    quotas = [_quota(folder) for folder in set(_group_folders(proc, root))]
    return min((quota for quota in quotas if quota is not None), default=None)


def _group_folders(proc: Path, root: Path) -> Iterator[Path]:
    """Yield the folder of every group that may limit this process, whichever of them exist."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            tops = [root / name for name in V2_FOLDERS]
        elif "cpu" in controllers.split(","):
            tops = [
                root / "cpu",
                root / controllers,
            ]  # the second where two controllers share a mount
        else:
            continue
        for top in tops:
            yield from _upwards(top, path)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """Yield the group and its ancestors up to `top`.

    In a container the path may be the host's, of which only an end exists below `top`, or nothing.
    """
    parts = [part for part in Path(path).parts if part not in ("/", "..")]
    ends = (parts[start:] for start in range(len(parts)))
    own = next((end for end in ends if top.joinpath(*end).is_dir()), [])
    for depth in range(len(own), -1, -1):
        yield top.joinpath(*own[:depth])


def _quota(folder: Path) -> float | None:
    texts = _words(folder / "cpu.max")
    if not texts:
        texts = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    try:
        quota, period = map(int, texts)
    except ValueError:  # "max 100000", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None  # version 1 says -1 for no limit


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, ValueError):
        return []
