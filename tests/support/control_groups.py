"""A fake cgroup file system in a folder, and whether the real one allows new control groups."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path

import pytest

from lowtide.memory.os.cgroup import ControlGroup
from lowtide.memory.units import NotEnforceable

V1_FILES = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.memsw.limit_in_bytes": "9223372036854771712",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0",
}
V2_FILES = {
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0",
}


class PretendedKernel:
    """Adds the kernel's files to each new group, and refuses to remove a group that is in use.

    In version 2 a group has memory files where its parent hands that controller down.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, version: int) -> None:
        self.root = folder / "cgroup"
        self.top = self.root / "memory" if version == 1 else self.root
        self.proc = folder / "proc"
        self._version = version
        self._write = Path.write_text
        self.group("")
        if version == 2:
            self._write(self.root / "cgroup.controllers", "cpu memory")
        monkeypatch.setattr(Path, "mkdir", lambda path, **_: self._made(path))
        monkeypatch.setattr(Path, "rmdir", lambda path: self._removed(path))
        monkeypatch.setattr(Path, "write_text", lambda path, text: self._written(path, text))

    def group(self, path: str, *, hands_down: bool = True, busy: bool = False) -> Path:
        """Make a group that already exists when the test starts; a `busy` one cannot enable controllers."""
        folder = self.top / path
        os.makedirs(folder, exist_ok=True)
        control = folder / "cgroup.subtree_control"
        if busy:
            os.mkdir(control)
        elif self._version == 2:
            self._write(control, "memory" if hands_down else "")
        return folder

    def process(self, line: str) -> None:
        """Write /proc/self/cgroup."""
        os.makedirs(self.proc / "self", exist_ok=True)
        self._write(self.proc / "self" / "cgroup", line)

    def _made(self, path: Path) -> None:
        os.mkdir(path)
        self._write(path / "cgroup.procs", "")
        if self._version == 1:
            self._fill(path, V1_FILES)
        else:
            control = path.parent / "cgroup.subtree_control"
            if control.is_file() and "memory" in control.read_text():
                self._fill(path, V2_FILES)

    def _fill(self, path: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            self._write(path / name, text)

    def _removed(self, path: Path) -> None:
        if (path / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "Device or resource busy")
        shutil.rmtree(path)

    def _written(self, path: Path, text: str) -> None:
        self._write(path, text)
        if path.name == "cgroup.subtree_control" and "memory" in text:
            for child in path.parent.glob("*/cgroup.procs"):
                self._fill(child.parent, V2_FILES)


@functools.cache
def reason_against_enforcing() -> str:
    """Return why this machine allows no new group; empty if it does."""
    try:
        ControlGroup.make().remove()
    except NotEnforceable as error:
        return str(error)
    return ""
