"""The watchdog: when it reads, what it releases, when an answer ends, and that nothing is lost then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from processes import run_python

from lowtide import FakeModel, GenerationResult, Runtime
from lowtide.memory.reclaim import Reclaimed
from lowtide.runtime.generation import watchdog as module
from lowtide.runtime.generation.watchdog import Watchdog

Opened = Callable[..., Runtime]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The resident bytes at each reading in turn, the last one from then on. Every pass is watched."""
    readings = [0]
    monkeypatch.setattr(module, "INTERVAL_S", 0.0)
    monkeypatch.setattr(
        module, "read_resident_bytes", lambda: readings.pop(0) if len(readings) > 1 else readings[0]
    )
    return readings


class Trims:
    """Records the levels of its calls."""

    def __init__(self) -> None:
        self.levels: list[str] = []

    def __call__(self, level: str) -> Reclaimed:
        self.levels.append(level)
        return Reclaimed(level, 10)


def test_well_below_the_budget_nothing_is_done(resident: list[int]) -> None:
    trims = Trims()
    watchdog = Watchdog(1000, trims)
    resident[:] = [949]
    assert not watchdog.is_over()
    assert trims.levels == [] and watchdog.trims == ()


def test_the_milder_level_comes_first_and_no_more_than_needed(resident: list[int]) -> None:
    trims = Trims()
    watchdog = Watchdog(1000, trims)
    resident[:] = [960, 900]
    assert not watchdog.is_over()
    assert trims.levels == ["background"]
    resident[:] = [970]  # hardly more than before: nothing is released again
    assert not watchdog.is_over() and len(trims.levels) == 1
    resident[:] = [980]
    assert not watchdog.is_over()
    assert trims.levels == ["background", "background", "moderate"]
    assert watchdog.trims == (Reclaimed("background", 20), Reclaimed("moderate", 10))


def test_over_the_budget_it_tries_every_time(resident: list[int]) -> None:
    trims = Trims()
    watchdog = Watchdog(1000, trims)
    resident[:] = [1200, 1000]
    assert not watchdog.is_over()  # at the budget is not over it
    resident[:] = [1001, 900]
    assert not watchdog.is_over()
    resident[:] = [1001]
    assert watchdog.is_over()
    assert trims.levels == ["background", "moderate", "background", "background", "moderate"]


def test_it_reads_at_most_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    clock: Iterator[float] = iter([100.0, 100.01, 100.019, 100.021, 100.03])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "read_resident_bytes", lambda: readings.append(1) or 0)
    watchdog = Watchdog(1000, Trims())
    assert [watchdog.is_over() for _ in range(5)] == [False] * 5
    assert len(readings) == 2


def test_an_answer_over_the_budget_ends_and_the_next_one_goes_on(
    fake_runtime: Opened, resident: list[int]
) -> None:
    runtime = fake_runtime("Hello.", "Hello.")
    budget = runtime.plan.budget.num_bytes
    resident[:] = [0, 0, 0, budget + 1]
    result = GenerationResult.of(runtime.chat(HELLO, temperature=0))
    assert (result.text, result.finish_reason) == ("Hell", "memory")
    assert bytes(result.token_ids) == b"Hell"
    assert [trim["level"] for trim in result.stats.to_dict()["trims"]] == ["background", "moderate"]
    resident[:] = [0]
    history = [*HELLO, {"role": "assistant", "content": result.text}, *HELLO]
    again = GenerationResult.of(runtime.chat(history, temperature=0))
    assert (again.text, again.finish_reason, again.stats.trims) == ("Hello.", "stop", ())
    assert again.stats.reused_tokens >= result.stats.prompt_tokens + 3


def test_an_answer_that_is_complete_does_not_end_for_memory(
    fake_runtime: Opened, resident: list[int]
) -> None:
    runtime = fake_runtime("Hello.")
    resident[:] = [0, 0, runtime.plan.budget.num_bytes + 1]
    result = GenerationResult.of(runtime.chat(HELLO, temperature=0, max_tokens=3))
    assert result.finish_reason == "length"


BASELINE = """
import json
from lowtide import GenerationResult, Runtime
with Runtime.open("smollm2", memory="260MiB", context=512, threads=1) as runtime:
    question = [{"role": "user", "content": "Count to a hundred."}]
    blocks, answer = [], ""
    for chunk in runtime.chat(question, temperature=0, max_tokens=80):
        answer += chunk.text
        blocks.append(bytearray(b"x") * (4 << 20))
    del blocks
    again = GenerationResult.of(runtime.chat(question, temperature=0, max_tokens=80))
    print(json.dumps([chunk.finish_reason, answer, again.text, again.finish_reason, chunk.stats.to_dict()]))
"""


@pytest.mark.real
def test_a_host_program_that_grows_ends_the_answer_alone() -> None:
    done = run_python(BASELINE)
    assert done.code == 0, done.stderr
    finish_reason, answer, whole, then, stats = json.loads(done.stdout)
    assert finish_reason == "memory" and then in ("stop", "length")
    assert answer and whole.startswith(answer) and len(whole) > len(answer)
    assert stats["trims"] and stats["generated_tokens"] < 80
    assert done.peak_bytes < 300 << 20  # it ended soon after the budget was exceeded


def test_far_below_the_budget_nothing_is_released() -> None:
    with Runtime.open(FakeModel(["Hello."]), memory="8GiB") as runtime:
        assert runtime.generate("x\n", temperature=0).stats.trims == ()
