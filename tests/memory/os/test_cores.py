"""Which CPUs to compute on, from fabricated descriptions of processors."""

from __future__ import annotations

from pathlib import Path

from lowtide.memory.os.cores import computing_cpus


def describe(folder: Path, cpu: int, siblings: str, capacity: int | None = None) -> None:
    (folder / f"cpu{cpu}" / "topology").mkdir(parents=True)
    (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    if capacity is not None:
        (folder / f"cpu{cpu}" / "cpu_capacity").write_text(f"{capacity}\n")


def test_hyperthreads_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        describe(tmp_path, cpu, f"{cpu % 4},{cpu % 4 + 4}")
    assert computing_cpus(set(range(8)), tmp_path) == {0, 1, 2, 3}
    assert computing_cpus({4, 5}, tmp_path) == {4, 5}
    assert computing_cpus({1, 5}, tmp_path) == {1}


def test_slow_cores_are_left_out_unless_there_are_no_others(tmp_path: Path) -> None:
    for cpu, capacity in enumerate((250, 250, 800, 1024)):
        describe(tmp_path, cpu, str(cpu), capacity)
    assert computing_cpus({0, 1, 2, 3}, tmp_path) == {2, 3}
    assert computing_cpus({0, 1}, tmp_path) == {0, 1}


def test_a_system_that_does_not_describe_its_cores(tmp_path: Path) -> None:
    assert computing_cpus({0, 3}, tmp_path) == {0, 3}
