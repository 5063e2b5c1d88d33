"""ControlGroup: a group of our own in the kernel's hierarchy, whose memory it holds under a limit.

What counts against the limit: anonymous memory, pages of files that the group was the first to read (also
those that are cached and not mapped), and the kernel's own bookkeeping for its processes. What does not:
pages of files that others had read before, such as a model's that was run a minute ago, so that more
may be resident than the limit says; and whatever is outside the group. Near the limit the kernel drops
cached pages, unmapped ones first; only what cannot be dropped gets a process killed. Knows no plan.
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
"""A group is named after the process that made it, `lowtide-1234`; one of several, `lowtide-1234-0`."""
KERNEL_SHARE = 64
KERNEL_BYTES = 4 * MIB
"""What the kernel charges beside the resident set: page tables (1/512 of what is mapped, twice where file
and copy are), threads' stacks, and batches of 64 pages that each processor charges ahead."""
REMOVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class _Version:
    """The files of one version of control groups."""

    limit: str
    swap_limit: str
    events: str


V1 = _Version("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
V2 = _Version("memory.max", "memory.swap.max", "memory.events")


def limit_for(budget_bytes: int) -> int:
    """Return the limit under which a process that keeps `budget_bytes` resident is never squeezed."""
    return budget_bytes + budget_bytes // KERNEL_SHARE + KERNEL_BYTES


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """The folder of a group; `make` makes one beneath this process's own, `joined` finds ours."""

    folder: Path
    version: _Version

    @classmethod
    def make(
        cls, proc: Path = PROC, root: Path = CGROUP_ROOT, *, number: int | None = None
    ) -> ControlGroup:
        """Make a group without a limit, named after this process, and remove what dead ones left behind.

        Whoever makes several gives each a `number`.

        It lies beneath our own group or, where that may not have children, beneath the nearest above it,
        but never outside a limit that holds for us. Raises `NotEnforceable` with the reason where none can
        be made.
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
            reason = f"{parent} does not hand its memory controller down"
            group.remove()
        raise NotEnforceable(
            f"--enforce needs a control group that it may make, and there is none ({reason}): start it "
            "with `systemd-run --user --scope lowtide ...`, run as root, or leave --enforce out"
        )

    @classmethod
    def joined(
        cls, maker_pid: int, proc: Path = PROC, root: Path = CGROUP_ROOT
    ) -> ControlGroup | None:
        """Return the group that this process is in where `maker_pid` made it; None otherwise."""
        try:
            version, folder, _ = _own(proc, root)
        except NotEnforceable:
            return None
        return cls(folder, version) if folder.name == f"{PREFIX}{maker_pid}" else None

    def _has_memory(self) -> bool:
        """Whether the memory controller is there; the parent is asked for it where nobody has."""
        limit = self.folder / self.version.limit
        if not limit.exists():
            with contextlib.suppress(OSError):
                (self.folder.parent / "cgroup.subtree_control").write_text("+memory")
        return os.access(limit, os.W_OK) and os.access(self.folder / "cgroup.procs", os.W_OK)

    def admit(self, pid: int) -> None:
        """Move a process in: what it allocates from now on counts. Raises `NotEnforceable`."""
        self._write("cgroup.procs", pid)

    def hold(self, num_bytes: int) -> None:
        """Set the limit, swap included. Raises `NotEnforceable` where more is held already."""
        self._write(self.version.limit, num_bytes)
        swap = self.folder / self.version.swap_limit
        # Version 1 limits memory and swap together, version 2 swap alone; without the file there is none.
        with contextlib.suppress(OSError):
            if swap.exists():
                swap.write_text(str(num_bytes) if self.version is V1 else "0")

    def _write(self, name: str, value: int) -> None:
        path = self.folder / name
        try:
            path.write_text(str(value))
        except OSError as error:
            raise NotEnforceable(
                f"--enforce cannot write {value} to {path} ({error.strerror or error}): raise --memory, or "
                "leave --enforce out"
            ) from None

    @property
    def limit_bytes(self) -> int | None:
        """The limit that is set; None where there is none."""
        return _limit(self.folder / self.version.limit)

    @property
    def num_kills(self) -> int:
        """How many processes of the group the kernel has killed for their memory."""
        try:
            lines = (self.folder / self.version.events).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self) -> None:
        """End what still runs in the group and remove it; does not raise."""
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
    """Return the groups that may be the parent of ours, from our own up to the first with a limit."""
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
    """Return the version that has the memory controller, our group in it, and the top of its hierarchy."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        raise NotEnforceable(
            "--enforce needs the control groups of Linux, and this system has none: leave it out; the plan "
            "and the watchdog keep the budget without it"
        ) from None
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for _, controllers, path in fields:
        if "memory" in controllers.split(","):
            return V1, _folder(root / "memory", path), root / "memory"
    for hierarchy, controllers, path in fields:
        if hierarchy == "0" and not controllers and (root / "cgroup.controllers").exists():
            return V2, _folder(root, path), root
    raise NotEnforceable(
        "--enforce needs the memory controller of control groups, which this kernel does not have switched "
        "on: boot with cgroup_enable=memory, or leave --enforce out"
    )


def _folder(top: Path, path: str) -> Path:
    folder = top.joinpath(*(part for part in Path(path).parts if part not in ("/", "..")))
    # Inside a container the path is often the host's: then our own group is what is mounted, or in it.
    return next((known for known in (folder, top / folder.name) if known.is_dir()), top)


def _limit(path: Path) -> int | None:
    try:
        num_bytes = int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
    return num_bytes if num_bytes < UNLIMITED else None


def _remove_abandoned(parent: Path, proc: Path) -> None:
    """Remove the groups of processes that were killed before they could; one in use stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        maker_pid, _, _ = folder.name.removeprefix(PREFIX).partition("-")
        if not (proc / maker_pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
