"""The CPU quota of control groups, of both versions and nested, and the threads that follow from it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_measured

from lowtide.memory import machine as machine_module
from lowtide.memory.machine import read_machine, usable_cores
from lowtide.memory.os.cpu_quota import cpu_quota
from lowtide.runtime.backends.config import LoadConfig


class Groups:
    """Fabricated /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.root.mkdir()

    def process(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")

    def v2(self, path: str, text: str) -> None:
        self._write(self.root / path / "cpu.max", text)

    def v1(self, path: str, quota: int, period: int = 100_000, controller: str = "cpu") -> None:
        folder = self.root / controller / path
        self._write(folder / "cpu.cfs_quota_us", str(quota))
        self._write(folder / "cpu.cfs_period_us", str(period))

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    @property
    def quota(self) -> float | None:
        return cpu_quota(self.proc, self.root)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_version_2(groups: Groups) -> None:
    groups.process("0::/user.slice/app")
    assert groups.quota is None
    groups.v2("user.slice/app", "max 100000")
    assert groups.quota is None
    groups.v2("user.slice/app", "150000 100000")
    assert groups.quota == 1.5


def test_version_1(groups: Groups) -> None:
    groups.process("4:memory:/other", "1:cpu:/box", "0::/")
    groups.v1("box", -1)
    assert groups.quota is None
    groups.v1("box", 25_000, 50_000)
    assert groups.quota == 0.5


def test_the_tightest_ancestor_counts(groups: Groups) -> None:
    groups.process("0::/a/b/c")
    groups.v2("a/b/c", "400000 100000")
    groups.v2("a/b", "max 100000")
    groups.v2("a", "20000 10000")
    groups.v2("elsewhere", "1000 100000")
    assert groups.quota == 2


def test_a_group_of_the_same_name_elsewhere_does_not_count(groups: Groups) -> None:
    groups.process("0::/a/b")
    groups.v2("a/b", "300000 100000")
    groups.v2("b", "1000 100000")
    assert groups.quota == 3


@pytest.mark.parametrize("path", ["/docker/0123", "/../0123", "/kubepods/pod1/0123"])
def test_a_container_sees_its_own_group_as_the_root(groups: Groups, path: str) -> None:
    groups.process(f"0::{path}")
    groups.v2("", "300000 100000")
    assert groups.quota == 3


def test_a_container_sees_an_end_of_the_path(groups: Groups) -> None:
    groups.process("3:cpu:/host/pod/box")
    groups.v1("pod/box", 50_000)
    groups.v1("pod", 300_000)
    assert groups.quota == 0.5


def test_controllers_that_share_a_mount(groups: Groups) -> None:
    groups.process("3:cpu,cpuacct:/box")
    groups.v1("box", 200_000, controller="cpu,cpuacct")
    assert groups.quota == 2


def test_version_2_beside_version_1(groups: Groups) -> None:
    groups.process("2:memory:/box", "0::/box")
    groups.v2("unified/box", "70000 100000")
    assert groups.quota == 0.7


@pytest.mark.parametrize("text", ["", "max", "0 0", "a b", "1 2 3", "100000 0", "-1 100000"])
def test_damaged_files_are_no_limit(groups: Groups, text: str) -> None:
    groups.process("0::/a")
    groups.v2("a", text)
    assert groups.quota is None


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cpus", "threads"),
    [
        ("1000 100000", 8, 1),
        ("150000 100000", 8, 1),
        ("390000 100000", 8, 3),
        ("900000 100000", 2, 2),
    ],
)
def test_the_threads_follow_affinity_and_quota(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int, threads: int
) -> None:
    monkeypatch.setattr(machine_module, "PROC", groups.proc)
    monkeypatch.setattr(machine_module, "CGROUP_ROOT", groups.root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cpus)))
    groups.process("0::/a")
    assert usable_cores() == cpus
    groups.v2("a", quota)
    assert usable_cores() == LoadConfig().num_threads == read_machine().cores == threads
    assert LoadConfig(threads=7).num_threads == 7
    assert read_machine().to_dict()["cpu_quota"] == cpu_quota(groups.proc, groups.root)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of version 1 or 2 that this test may limit; skips where there is none."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    is_v1 = (v1 / "cgroup.procs").exists()
    folder = (v1 if is_v1 else v2) / f"lowtide-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        if is_v1:
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text("50000")
        else:
            (folder / "cpu.max").write_text("50000 100000")
        yield folder
    except OSError as error:
        pytest.skip(f"the control group takes no quota: {error}")
    finally:
        folder.rmdir()


def test_a_real_group_with_half_a_cpu(real_group: Path) -> None:
    program = (
        "import os; from pathlib import Path\n"
        f"Path({str(real_group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "import json; from lowtide.memory.machine import read_machine\n"
        "print(json.dumps(read_machine().to_dict()))"
    )
    done = run_measured(sys.executable, "-c", program)
    assert done.code == 0, done.stderr
    machine = json.loads(done.stdout)
    assert (machine["cores"], machine["cpu_quota"]) == (1, 0.5)
