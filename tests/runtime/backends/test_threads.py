"""Which threads compute a pass, and that answers do not depend on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from load import computing

from lowtide import Runtime
from lowtide.models.errors import BadOption
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.backends.threads import DECODED_TOKENS, PassThreads, ThreadChooser


class Others:
    """Other threads of the test's choice."""

    def __init__(self) -> None:
        self.count = 0

    def threads(self) -> int:
        return self.count

    def close(self) -> None:
        self.count = -1


def chooser(num_threads: int, others: Others | None = None, **named: object) -> ThreadChooser:
    return ThreadChooser(num_threads, lambda _: None, others=others, **named)  # type: ignore[arg-type]


def chosen(threads: ThreadChooser, num_tokens: int = 1, num_cached: int = 0) -> PassThreads:
    threads.begin_pass(num_tokens, num_cached)
    return threads.current


def test_the_engine_gets_the_cores_that_others_leave() -> None:
    others = Others()
    threads = chooser(4, others)
    assert chosen(threads) == PassThreads(4)
    for others.count, left in ((1, 3), (2, 2), (3, 1), (9, 1), (0, 4)):
        assert chosen(threads) == PassThreads(left)


def test_helpers_get_the_cores_that_others_leave() -> None:
    others = Others()
    threads = chooser(3, others, has_team=True)
    for others.count, helped in ((0, 3), (1, 2), (2, 1), (5, 1)):
        assert chosen(threads) == PassThreads(1, helped)


def test_a_prompt_uses_the_threads_of_the_engine() -> None:
    others = Others()
    threads = chooser(3, others, has_team=True)
    for others.count, count in ((0, 3), (1, 2), (5, 1)):
        assert chosen(threads, DECODED_TOKENS) == PassThreads(count)


def test_a_number_that_was_asked_for_does_not_change() -> None:
    assert chosen(chooser(3)) == PassThreads(3)
    assert chosen(chooser(3, has_team=True)) == PassThreads(1, 3)


def test_the_number_is_fixed_where_results_depend_on_it() -> None:
    others = Others()
    others.count = 1
    threads = chooser(2, others, fixed_from=256)
    assert chosen(threads, num_cached=255).count == 1
    assert chosen(threads, num_cached=256).count == 2


def test_helpers_settle_before_the_graph_changes_and_at_the_end() -> None:
    settled: list[int] = []
    threads = chooser(2, has_team=True, settle=lambda: settled.append(1))
    for num_tokens, times in ((1, 1), (1, 1), (8, 2), (1, 3)):
        chosen(threads, num_tokens)
        assert len(settled) == times
    threads.close()
    assert len(settled) == 4


PROMPT = "The tide comes in, the tide goes out, and nobody on the shore knows why. " * 20


def answer(model: Path, **options: object) -> tuple[tuple[int, ...], int | None]:
    options = {"memory": "2GiB", "context": 1024, **options}
    with Runtime.open(model, **options) as runtime:
        result = runtime.generate(PROMPT, max_tokens=24, temperature=0)
        return tuple(result.token_ids), result.stats.threads


@pytest.mark.real
def test_greedy_answers_are_the_same_with_any_threads_and_under_load(smollm2: Path) -> None:
    ours = {"attention": "dense", "repack": True}
    expected, count = answer(smollm2, threads=1, **ours)
    assert count == 1
    for threads in (2, 3):
        found, count = answer(smollm2, threads=threads, **ours)
        assert (found, count) == (expected, threads)
    with computing(2):
        assert answer(smollm2, **ours)[0] == expected
        assert answer(smollm2, threads=2, **ours)[0] == expected


@pytest.mark.real
def test_the_engines_own_kernels_give_the_same_answer_under_load(smollm2: Path) -> None:
    expected, _ = answer(smollm2, attention="llama")
    with computing(1):
        assert answer(smollm2, attention="llama")[0] == expected


@pytest.mark.real
@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_nothing_spins_while_a_reader_is_slow_nor_after_the_answer(
    smollm2: Path, attention: str
) -> None:
    with Runtime.open(
        smollm2, memory="2GiB", context=512, attention=attention, repack=attention == "dense"
    ) as runtime:
        stream = runtime.stream("The tide", max_tokens=8, temperature=0)
        next(stream)
        assert cpu_seconds_of_a_pause() < 0.02
        list(stream)
        assert cpu_seconds_of_a_pause() < 0.02


def cpu_seconds_of_a_pause() -> float:
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.5)
    return time.process_time() - before


@pytest.mark.real
@pytest.mark.parametrize("attention", ["llama", "dense"])
def test_a_background_runtime_gives_the_same_answer_at_the_lowest_priority(
    smollm2: Path, attention: str
) -> None:
    options = {"attention": attention, "repack": attention == "dense", "threads": 2}
    expected, _ = answer(smollm2, **options)
    with Runtime.open(smollm2, memory="2GiB", context=1024, background=True, **options) as runtime:
        result = runtime.generate(PROMPT, max_tokens=24, temperature=0)
        policies = [os.sched_getscheduler(int(tid)) for tid in os.listdir("/proc/self/task")]
    assert tuple(result.token_ids) == expected
    assert policies.count(os.SCHED_IDLE) >= 2, "the thread that computes, and one that helps it"
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_the_background_leaves_a_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.runtime.backends.config.usable_cores", lambda: 4)
    assert LoadConfig().num_threads == LoadConfig(threads="auto").num_threads == 4
    assert LoadConfig(background=True).num_threads == 3
    assert LoadConfig(background=True, threads=2).num_threads == 2
    monkeypatch.setattr("lowtide.runtime.backends.config.usable_cores", lambda: 1)
    assert LoadConfig(background=True).num_threads == 1


@pytest.mark.parametrize("threads", ["many", "0", 0, 513, 1.5])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: object) -> None:
    with pytest.raises(BadOption, match="threads"):
        LoadConfig(threads=threads)  # type: ignore[arg-type]
