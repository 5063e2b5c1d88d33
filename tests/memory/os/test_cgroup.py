"""Control groups: where they are created, what is written into them, and the errors if none can be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from control_groups import PretendedKernel, reason_against_enforcing

from lowtide.memory.os.cgroup import ControlGroup, limit_for
from lowtide.memory.units import MIB, NotEnforceable

NAME = f"lowtide-{os.getpid()}"
real = pytest.mark.skipif(bool(reason_against_enforcing()), reason=reason_against_enforcing())


def create(kernel: PretendedKernel) -> ControlGroup:
    return ControlGroup.make(kernel.proc, kernel.root)


def test_version_1_creates_it_below_the_own_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    own = kernel.group("box/inner")
    kernel.process("9:name=systemd:/\n4:cpu,memory:/box/inner\n0::/")
    group = create(kernel)
    assert group.folder == own / NAME
    assert group.limit_bytes is None and group.num_kills == 0
    group.admit(4711)
    group.set_limit(300 * MIB)
    assert (group.folder / "cgroup.procs").read_text() == "4711"
    assert group.limit_bytes == 300 * MIB
    assert (group.folder / "memory.memsw.limit_in_bytes").read_text() == str(300 * MIB)
    (group.folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2")
    assert group.num_kills == 2


def test_version_2_goes_up_to_a_group_that_may_have_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=2)
    session = kernel.group("user/session")
    kernel.group(
        "user/session/app", busy=True
    )  # a group with processes may not have children with memory
    kernel.process("0::/user/session/app")
    group = create(kernel)
    assert group.folder == session / NAME
    assert not (session / "app" / NAME).exists()
    group.set_limit(300 * MIB)
    assert (group.folder / "memory.max").read_text() == str(300 * MIB)
    assert (group.folder / "memory.swap.max").read_text() == "0"
    group.remove()
    assert not group.folder.exists()


def test_version_2_asks_the_parent_for_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=2)
    own = kernel.group("own", hands_down=False)
    kernel.process("0::/own")
    assert create(kernel).folder == own / NAME


def test_it_never_leaves_a_group_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=2)
    kernel.group("user")
    own = kernel.group("user/app", busy=True)
    (own / "memory.max").write_text("1000000000")
    kernel.process("0::/user/app")
    with pytest.raises(NotEnforceable, match="does not delegate its memory controller"):
        create(kernel)
    (own / "memory.max").write_text("max")
    assert create(kernel).folder == kernel.top / "user" / NAME


def test_the_path_in_a_container_may_be_the_path_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    kernel.process("4:memory:/docker/0123abcd")
    group = create(kernel)
    assert group.folder == kernel.top / NAME
    kernel.process(f"4:memory:/docker/0123abcd/{NAME}")
    assert ControlGroup.joined(os.getpid(), kernel.proc, kernel.root) == group
    assert ControlGroup.joined(os.getpid() + 1, kernel.proc, kernel.root) is None


def test_groups_of_dead_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    kernel.process("4:memory:/")
    (kernel.proc / "41").mkdir()
    (kernel.proc / str(os.getpid())).mkdir()
    for name, processes in (
        ("lowtide-40", ""),
        ("lowtide-40-0", ""),
        ("lowtide-41", ""),
        ("lowtide-41-1", ""),
        ("lowtide-42", "7"),
    ):
        (kernel.top / name).mkdir()
        (kernel.top / name / "cgroup.procs").write_text(processes)
    create(kernel)
    ControlGroup.make(kernel.proc, kernel.root, number=0)
    names = {path.name for path in kernel.top.glob("lowtide-*")}
    assert names == {"lowtide-41", "lowtide-41-1", "lowtide-42", NAME, f"{NAME}-0"}


def test_the_reasons_why_no_group_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    with pytest.raises(
        NotEnforceable, match="which this system does not have: leave --enforce out"
    ):
        create(kernel)
    assert ControlGroup.joined(1, kernel.proc, kernel.root) is None
    kernel.process("3:cpu:/\n0::/")
    with pytest.raises(NotEnforceable, match="is switched off in this kernel"):
        create(kernel)
    kernel.process("4:memory:/")

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        NotEnforceable, match=r"Permission denied\): start lowtide with `systemd-run"
    ):
        create(kernel)


def test_the_limit_has_room_for_the_kernels_bookkeeping() -> None:
    for budget in (64 * MIB, 400 * MIB, 64 << 30):
        page_tables = 2 * budget // 512
        assert limit_for(budget) >= budget + page_tables + 2 * MIB
        assert limit_for(budget) <= budget * 1.1


ALLOCATE = "import sys; sys.stdin.read(1); block = bytearray(b'x') * (200 << 20); print('alive')"


def allocate(limit_bytes: int) -> tuple[subprocess.CompletedProcess[str], int]:
    """Allocate 200 MiB in a group with this limit; return the process and how many were killed."""
    group = ControlGroup.make()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", ALLOCATE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            group.admit(process.pid)
            group.set_limit(limit_bytes)
            stdout, _ = process.communicate("!")
        return subprocess.CompletedProcess([], process.returncode, stdout), group.num_kills
    finally:
        group.remove()
        assert not group.folder.exists()


@real
def test_the_kernel_enforces_the_limit() -> None:
    done, num_kills = allocate(limit_for(100 * MIB))
    assert (done.returncode, done.stdout, num_kills) == (-9, "", 1)
    done, num_kills = allocate(limit_for(240 * MIB))
    assert (done.returncode, done.stdout, num_kills) == (0, "alive\n", 0)


@real
def test_removing_kills_processes_that_still_run() -> None:
    group = ControlGroup.make()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        group.admit(process.pid)
        group.remove()
        assert process.wait() == -9
    assert not group.folder.exists()


@real
def test_a_dead_process_cannot_be_admitted() -> None:
    group = ControlGroup.make()
    try:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            process.wait()
        with pytest.raises(NotEnforceable, match="No such process"):
            group.admit(process.pid)
    finally:
        group.remove()
