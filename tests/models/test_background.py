"""A thread of the lowest priority."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from lowtide.models.background import LOWEST, BackgroundThread

linux = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")


def priority() -> tuple[int, int]:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)


@linux
def test_its_functions_have_the_lowest_priority_and_the_caller_keeps_its_own() -> None:
    before = priority()
    thread = BackgroundThread()
    assert thread.run(priority) == (LOWEST, os.SCHED_IDLE)
    assert priority() == before
    thread.close()
    thread.close()


@linux
def test_threads_that_it_starts_have_its_priority() -> None:
    def started() -> int:
        found: list[int] = []
        child = threading.Thread(target=lambda: found.append(priority()[0]))
        child.start()
        child.join()
        return found[0]

    thread = BackgroundThread()
    assert thread.run(started) == LOWEST
    thread.close()


def test_it_returns_what_the_function_returns_and_raises_what_it_raises() -> None:
    thread = BackgroundThread()
    assert thread.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        thread.run(divmod, 7, 0)
    thread.close()


def test_an_interrupted_caller_waits_for_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the function reads may be freed by a caller that goes on."""
    ended: list[bool] = []
    thread = BackgroundThread()
    alarm = threading.Timer(0.1, lambda: os.kill(os.getpid(), 2))
    # A shell starts what runs in its background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        thread.run(lambda: (time.sleep(0.4), ended.append(True)))
    signal.signal(signal.SIGINT, before)
    assert ended == [True]
    thread.close()
