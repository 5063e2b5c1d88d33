"""The machine and its container limits, and the default budget."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lowtide.memory import machine as machine_module
from lowtide.memory.budget import Budget
from lowtide.memory.machine import CgroupMemory, Machine, cgroup_limits, read_machine
from lowtide.memory.units import BadSize

GIB = 1 << 30


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def _proc(tmp_path: Path, line: str) -> Path:
    _write(tmp_path / "proc" / "self", cgroup=line)
    return tmp_path / "proc"


def test_version_2_reads_every_limit_up_the_hierarchy(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _write(root / "user" / "app", memory__max=2 * GIB, memory__current=GIB)
    _write(root / "user" / "app", memory__stat=f"anon 5\ninactive_file {GIB // 2}\nactive_file 7")
    _write(root / "user", memory__max="max", memory__current=3 * GIB)
    groups = cgroup_limits(_proc(tmp_path, "0::/user/app"), root)
    assert groups == [CgroupMemory(2 * GIB, GIB // 2)]
    assert groups[0].free_bytes == 3 * GIB // 2


def test_version_1_uses_the_memory_controller(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    limits = {"memory__limit_in_bytes": GIB, "memory__usage_in_bytes": GIB}
    _write(root / "memory" / "box", **limits, memory__stat=f"total_inactive_file {GIB // 4}")
    _write(root / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1)
    proc = _proc(tmp_path, "5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box")
    assert cgroup_limits(proc, root) == [CgroupMemory(GIB, 3 * GIB // 4)]


def test_a_container_sees_only_the_root(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _write(root, memory__max=GIB, memory__current=1000)
    proc = _proc(tmp_path, "0::/docker/0123abcd")
    assert cgroup_limits(proc, root) == [CgroupMemory(GIB, 1000)]


def test_the_free_memory_of_a_group_is_never_negative() -> None:
    assert CgroupMemory(10, 20).free_bytes == 0


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "nothing", tmp_path) == []


def test_the_machine_respects_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cgroup"
    _write(root, memory__max=300 << 20, memory__current=100 << 20)
    monkeypatch.setattr(machine_module, "PROC", _proc(tmp_path, "0::/"))
    monkeypatch.setattr(machine_module, "CGROUP_ROOT", root)
    machine = read_machine()
    assert (machine.total_bytes, machine.available_bytes) == (300 << 20, 200 << 20)
    assert machine.limited_by == "cgroup"


def test_this_machine() -> None:
    machine = read_machine()
    assert 0 < machine.available_bytes <= machine.total_bytes
    assert machine.cores >= 1
    assert machine.to_dict()["system"] == machine.system


MACHINE = Machine(
    system="s", processor="p", cores=1, total_bytes=1000, available_bytes=500, limited_by=None
)


def test_the_default_budget_is_80_percent_of_the_available_memory() -> None:
    budget = Budget.from_user(None, MACHINE)
    assert budget.num_bytes == 400
    assert budget.source == "80 % of the 500 B available"


def test_budgets_from_the_user() -> None:
    assert Budget.from_user("50%", MACHINE).num_bytes == 250
    assert Budget.from_user(300, MACHINE).warning is None
    assert "larger than the 500 B" in (Budget.from_user("600", MACHINE).warning or "")
    with pytest.raises(BadSize):
        Budget.from_user("lots", MACHINE)


def test_the_memory_is_that_of_meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = _proc(tmp_path, "0::/")
    monkeypatch.setattr(machine_module, "PROC", proc)
    monkeypatch.setattr(machine_module, "CGROUP_ROOT", tmp_path / "none")
    (proc / "meminfo").write_text(
        "MemTotal:       1048576 kB\nMemFree:          1024 kB\nMemAvailable:     524288 kB\n"
        "HugePages_Total:       0\n"
    )
    machine = read_machine()
    assert (machine.total_bytes, machine.available_bytes) == (1 << 30, 1 << 29)


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 4 kB\n", "MemTotal: many kB\n", "MemTotal:\n"])
def test_another_meminfo_is_left_to_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meminfo: str
) -> None:
    proc = _proc(tmp_path, "0::/")
    monkeypatch.setattr(machine_module, "PROC", proc)
    monkeypatch.setattr(machine_module, "CGROUP_ROOT", tmp_path / "none")
    (proc / "meminfo").write_text(meminfo)
    assert read_machine().total_bytes == psutil.virtual_memory().total
