"""How many answers `lowtide serve` computes together where the budget holds fewer than it would."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from serve_process import RUN, Process, started

CONTEXT = ("--context", "1024")
NOTE = "answers are computed one at a time, not 4 together"


def refusal(model: Path, *arguments: str) -> str:
    """Run a command that must be refused; return what it says."""
    command = [sys.executable, "-c", RUN, "serve", str(model), "--port", "0", *CONTEXT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    return done.stderr


def least_mib(text: str) -> int:
    """Return the smallest budget that a refusal names."""
    found = re.search(r"needs at least (\d+) MiB, but the limit is (\d+)", text)
    assert found is not None, text
    return int(found[1])


def answered(server: Process, num_clients: int) -> list[int]:
    """Ask at the same time; return the statuses."""
    statuses: list[int] = []
    body = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 4}
    clients = [
        threading.Thread(
            target=lambda: statuses.append(server.post("/v1/chat/completions", body)[0])
        )
        for _ in range(num_clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return statuses


@pytest.mark.real
def test_a_small_budget_has_one_answer_at_a_time_and_says_so(smollm2: Path) -> None:
    one, four = (least_mib(refusal(smollm2, "--memory", "50MiB", "--sequences", n)) for n in "14")
    assert four - one >= 8  # else no budget is surely between them
    between = f"{(one + four) // 2}MiB"
    with started(smollm2, *CONTEXT, "--memory", between) as server:
        (note,) = [line for line in server.lines if NOTE in line]
        assert abs(least_mib(note) - four) <= 4  # what the process holds at its start differs
        assert f"the limit is {(one + four) // 2}" in note and "raise --memory" in note
        assert server.status()["queue"]["sequences"] == 1
        assert answered(server, 4) == [200] * 4
        assert server.peak_bytes <= ((one + four) // 2) << 20
    stated = refusal(smollm2, "--memory", between, "--sequences", "4")
    assert least_mib(stated) and NOTE not in stated


@pytest.mark.real
def test_a_budget_that_holds_no_answer_is_refused_without_the_note(smollm2: Path) -> None:
    stated = refusal(smollm2, "--memory", "50MiB")
    assert least_mib(stated) and NOTE not in stated


@pytest.mark.real
def test_a_budget_that_holds_them_says_nothing(smollm2: Path) -> None:
    with started(smollm2, *CONTEXT, "--memory", "300MiB") as server:
        assert server.status()["queue"]["sequences"] == 4
        assert not any(NOTE in line for line in server.lines)
