"""ControlGroup: a Linux control group (cgroup) with a memory limit, for `--enforce` (see cli/common/enforce.py).

The kernel charges three things to the group: anonymous memory; pages of files that the group was the first
to read, mapped or only cached; and the kernel's own bookkeeping for the processes (page tables, stacks).
It does not charge file pages that another process had read before, for example the weights of a model that
ran a minute ago. So the resident set may be larger than the limit. Near the limit the kernel drops cached
pages, unmapped ones first; it kills a process only if nothing can be dropped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory.machine import CGROUP_ROOT, PROC, UNLIMITED
from lowtide.memory.units import MIB, NotEnforceable

PREFIX = "lowtide-"
"""A group is named after the process that makes it: `lowtide-1234`, or `lowtide-1234-0` for one of several."""
KERNEL_SHARE = 64
KERNEL_BYTES = 4 * MIB
"""Room for what the kernel charges beside the resident set: page tables (1/512 of the mapped bytes, twice if
a file and its copy are mapped), thread stacks, and batches of 64 pages that each processor charges ahead."""
REMOVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class _Version:
    """File names of one version of control groups."""

    limit: str
    swap_limit: str
    events: str


V1 = _Version("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
V2 = _Version("memory.max", "memory.swap.max", "memory.events")


def limit_for(budget_bytes: int) -> int:
    """Return the group limit under which a process may keep `budget_bytes` resident without reclaim."""
    return budget_bytes + budget_bytes // KERNEL_SHARE + KERNEL_BYTES


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A group by its folder: `make` creates one below this process's group, `joined` finds the current one."""

    folder: Path
    version: _Version

    @classmethod
    def make(
        cls, proc: Path = PROC, root: Path = CGROUP_ROOT, *, number: int | None = None
    ) -> ControlGroup:
        """Create a group without a limit, named after this process; a `number` tells several apart.

        Removes the groups of dead processes. The new group lies below this process's own group or, if that
        group may not have children, below the nearest ancestor that may; never outside of a limit that
        applies to this process. Raises `NotEnforceable` with the reason if no group can be created.
        """
        version, parents = _parents(proc, root)
        name = f"{PREFIX}{os.getpid()}" + ("" if number is None else f"-{number}")
        reason = "its folder cannot be written"
        for parent in parents:
            group = cls(parent / name, version)
            try:
                _remove_abandoned(parent, proc)
                group.folder.mkdir(exist_ok=True)
            except OSError as error:
                reason = f"{parent}: {error.strerror or error}"
                continue
            if group._has_memory():
                return group
            reason = f"{parent} does not delegate its memory controller"
            group.remove()
        raise NotEnforceable(
            f"--enforce cannot create a control group ({reason}): start lowtide with "
            "`systemd-run --user --scope lowtide ...`, run it as root, or leave --enforce out"
        )

    @classmethod
    def joined(
        cls, maker_pid: int, proc: Path = PROC, root: Path = CGROUP_ROOT
    ) -> ControlGroup | None:
        """Return the group of this process if process `maker_pid` created it, else None."""
        try:
            version, folder, _ = _own(proc, root)
        except NotEnforceable:
            return None
        return cls(folder, version) if folder.name == f"{PREFIX}{maker_pid}" else None

    def _has_memory(self) -> bool:
        """Whether the group has the memory controller; asks the parent to delegate it if it is missing."""
        limit = self.folder / self.version.limit
        if not limit.exists():
            with contextlib.suppress(OSError):
                (self.folder.parent / "cgroup.subtree_control").write_text("+memory")
        return os.access(limit, os.W_OK) and os.access(self.folder / "cgroup.procs", os.W_OK)

    def admit(self, pid: int) -> None:
        """Move a process into the group; its later allocations count. Raises `NotEnforceable`."""
        self._write("cgroup.procs", pid)

    def set_limit(self, num_bytes: int) -> None:
        """Set the limit, swap included. Raises `NotEnforceable` if the group uses more already."""
        self._write(self.version.limit, num_bytes)
        swap = self.folder / self.version.swap_limit
        # Version 1 limits the sum of memory and swap, version 2 swap alone. Without the file there is no swap.
        with contextlib.suppress(OSError):
            if swap.exists():
                swap.write_text(str(num_bytes) if self.version is V1 else "0")

    def _write(self, name: str, value: int) -> None:
        path = self.folder / name
        try:
            path.write_text(str(value))
        except OSError as error:
            raise NotEnforceable(
                f"--enforce cannot write {value} to {path} ({error.strerror or error}): raise --memory or "
                "leave --enforce out"
            ) from None

    @property
    def limit_bytes(self) -> int | None:
        """The memory limit, None if there is none."""
        return _limit(self.folder / self.version.limit)

    @property
    def num_kills(self) -> int:
        """How many processes of the group the kernel has killed at the limit."""
        try:
            lines = (self.folder / self.version.events).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Kill the processes that still run in the group and remove it; does not raise."""
        until = time.monotonic() + REMOVAL_S
        while self.folder.exists():
            with contextlib.suppress(OSError):
                for line in (self.folder / "cgroup.procs").read_text().split():
                    os.kill(int(line), signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            if time.monotonic() > until:
                return
            time.sleep(0.01)


def _parents(proc: Path, root: Path) -> tuple[_Version, list[Path]]:
    """Return the possible parents: this process's group and its ancestors, up to the first with a limit."""
    version, own, top = _own(proc, root)
    return version, list(_upwards(own, top, version))


def _upwards(own: Path, top: Path, version: _Version) -> Iterator[Path]:
    folder = own
    while True:
        yield folder
        if folder == top or _limit(folder / version.limit) is not None:
            return
        folder = folder.parent


def _own(proc: Path, root: Path) -> tuple[_Version, Path, Path]:
    """Return the version with the memory controller, this process's group, and the top of the hierarchy."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        raise NotEnforceable(
            "--enforce needs Linux control groups, which this system does not have: leave --enforce out; the "
            "plan and the watchdog keep the budget without it"
        ) from None
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for _, controllers, path in fields:
        if "memory" in controllers.split(","):
            return V1, _folder(root / "memory", path), root / "memory"
    for hierarchy, controllers, path in fields:
        if hierarchy == "0" and not controllers and (root / "cgroup.controllers").exists():
            return V2, _folder(root, path), root
    raise NotEnforceable(
        "--enforce needs the memory controller of control groups, which is switched off in this kernel: boot "
        "with cgroup_enable=memory, or leave --enforce out"
    )


def _folder(top: Path, path: str) -> Path:
    folder = top.joinpath(*(part for part in Path(path).parts if part not in ("/", "..")))
    # Inside a container the path is often the host's. Then this process's group is the mount or below it.
    return next((known for known in (folder, top / folder.name) if known.is_dir()), top)


def _limit(path: Path) -> int | None:
    try:
        num_bytes = int(path.read_text())
    except (OSError, ValueError):  # "max" means no limit
        return None
    return num_bytes if num_bytes < UNLIMITED else None


def _remove_abandoned(parent: Path, proc: Path) -> None:
    """Remove the groups of processes that died without removing them; a group in use stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        maker_pid, _, _ = folder.name.removeprefix(PREFIX).partition("-")
        if not (proc / maker_pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
