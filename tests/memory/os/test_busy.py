"""How many threads of others compete for the cores."""

from __future__ import annotations

from pathlib import Path

from load import computing

from lowtide.memory.os.busy import SECONDS, OtherWork


class Machine:
    """A /proc/loadavg of the test, and its clock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "loadavg"
        self.now = 0.0
        self.runnable = 1
        self._path.write_text("0.00 0.00 0.00 1/200 4242\n")

    def ask(self, other: OtherWork, seconds: float) -> int:
        self._path.write_text(f"0.50 0.25 0.10 {self.runnable}/200 4242\n")
        self.now += seconds
        return other.threads()


def test_the_asking_thread_does_not_count(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    other = OtherWork(proc=tmp_path, clock=lambda: machine.now)
    assert [machine.ask(other, 0.01) for _ in range(10)] == [0] * 10


def test_the_first_look_is_believed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.runnable = 4
    assert machine.ask(OtherWork(proc=tmp_path, clock=lambda: machine.now), 0.0) == 3


def test_a_short_job_changes_nothing_and_a_long_one_does(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    other = OtherWork(proc=tmp_path, clock=lambda: machine.now)
    machine.ask(other, 0.0)
    machine.runnable = 2
    assert machine.ask(other, SECONDS / 10) == 0
    machine.runnable = 1
    assert machine.ask(other, SECONDS / 10) == 0
    machine.runnable = 2
    found = [machine.ask(other, SECONDS / 10) for _ in range(40)]
    assert found[0] == 0 and found[-1] == 1 and found == sorted(found)
    machine.runnable = 1
    back = [machine.ask(other, SECONDS / 10) for _ in range(40)]
    assert back[0] == 1 and back[-1] == 0 and back == sorted(back, reverse=True)


def test_cores_that_the_process_may_not_use_are_filled_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.runnable = 8
    other = OtherWork(spare_cores=6, proc=tmp_path, clock=lambda: machine.now)
    assert machine.ask(other, 0.0) == 1


def test_a_system_that_does_not_tell_has_no_other_work(tmp_path: Path) -> None:
    assert OtherWork(proc=tmp_path).threads() == 0
    (tmp_path / "loadavg").write_text("no numbers")
    other = OtherWork(proc=tmp_path)
    assert other.threads() == 0
    other.close()
    assert other.threads() == 0


def test_processes_that_compute_are_seen() -> None:
    with computing(3):
        assert max(OtherWork().threads() for _ in range(20)) >= 2
