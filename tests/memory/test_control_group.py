"""Control groups: where one is made, what is written into it, what is told where none can be."""

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


def made(kernel: PretendedKernel) -> ControlGroup:
    return ControlGroup.make(kernel.proc, kernel.root)


def test_version_1_makes_it_beneath_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    own = kernel.group("box/inner")
    kernel.process("9:name=systemd:/\n4:cpu,memory:/box/inner\n0::/")
    group = made(kernel)
    assert group.folder == own / NAME
    assert group.limit_bytes is None and group.num_kills == 0
    group.admit(4711)
    group.hold(300 * MIB)
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
    )  # it has processes: so may have no children with memory
    kernel.process("0::/user/session/app")
    group = made(kernel)
    assert group.folder == session / NAME
    assert not (session / "app" / NAME).exists()
    group.hold(300 * MIB)
    assert (group.folder / "memory.max").read_text() == str(300 * MIB)
    assert (group.folder / "memory.swap.max").read_text() == "0"
    group.remove()
    assert not group.folder.exists()


def test_version_2_asks_for_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=2)
    own = kernel.group("own", hands_down=False)
    kernel.process("0::/own")
    assert made(kernel).folder == own / NAME


def test_it_never_leaves_a_limit_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=2)
    kernel.group("user")
    own = kernel.group("user/app", busy=True)
    (own / "memory.max").write_text("1000000000")
    kernel.process("0::/user/app")
    with pytest.raises(NotEnforceable, match="does not hand its memory controller down"):
        made(kernel)
    (own / "memory.max").write_text("max")
    assert made(kernel).folder == kernel.top / "user" / NAME


def test_in_a_container_the_path_is_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    kernel.process("4:memory:/docker/0123abcd")
    group = made(kernel)
    assert group.folder == kernel.top / NAME
    kernel.process(f"4:memory:/docker/0123abcd/{NAME}")
    assert ControlGroup.joined(os.getpid(), kernel.proc, kernel.root) == group
    assert ControlGroup.joined(os.getpid() + 1, kernel.proc, kernel.root) is None


def test_what_dead_processes_left_is_removed(
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
    made(kernel)
    ControlGroup.make(kernel.proc, kernel.root, number=0)
    left = {path.name for path in kernel.top.glob("lowtide-*")}
    assert left == {"lowtide-41", "lowtide-41-1", "lowtide-42", NAME, f"{NAME}-0"}


def test_the_reasons_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PretendedKernel(tmp_path, monkeypatch, version=1)
    with pytest.raises(NotEnforceable, match="this system has none: leave it out"):
        made(kernel)
    assert ControlGroup.joined(1, kernel.proc, kernel.root) is None
    kernel.process("3:cpu:/\n0::/")
    with pytest.raises(NotEnforceable, match="does not have switched on"):
        made(kernel)
    kernel.process("4:memory:/")

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(NotEnforceable, match=r"Permission denied\): start it with `systemd-run"):
        made(kernel)


def test_the_limit_leaves_room_for_the_kernels_own() -> None:
    for budget in (64 * MIB, 400 * MIB, 64 << 30):
        page_tables = 2 * budget // 512
        assert limit_for(budget) >= budget + page_tables + 2 * MIB
        assert limit_for(budget) <= budget * 1.1


HOG = "import sys; sys.stdin.read(1); block = bytearray(b'x') * (200 << 20); print('alive')"


def hog(limit_bytes: int) -> tuple[subprocess.CompletedProcess[str], int]:
    """Allocate 200 MiB in a group with this limit."""
    group = ControlGroup.make()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            group.admit(process.pid)
            group.hold(limit_bytes)
            stdout, _ = process.communicate("!")
        return subprocess.CompletedProcess([], process.returncode, stdout), group.num_kills
    finally:
        group.remove()
        assert not group.folder.exists()


@real
def test_the_kernel_holds_the_limit() -> None:
    done, num_kills = hog(limit_for(100 * MIB))
    assert (done.returncode, done.stdout, num_kills) == (-9, "", 1)
    done, num_kills = hog(limit_for(240 * MIB))
    assert (done.returncode, done.stdout, num_kills) == (0, "alive\n", 0)


@real
def test_removing_ends_what_still_runs() -> None:
    group = ControlGroup.make()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        group.admit(process.pid)
        group.remove()
        assert process.wait() == -9
    assert not group.folder.exists()


@real
def test_a_process_that_is_gone_cannot_be_admitted() -> None:
    group = ControlGroup.make()
    try:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            process.wait()
        with pytest.raises(NotEnforceable, match="No such process"):
            group.admit(process.pid)
    finally:
        group.remove()
