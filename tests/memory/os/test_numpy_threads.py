"""numpy's threads under the command line, in a process of its own, since numpy loads once."""

from __future__ import annotations

import os

import pytest
from processes import run_python

PROGRAM = """
import os
{before}
from lowtide.memory import machine
machine.cpu_quota = lambda *_: 1.5
from lowtide.cli import main

def command():
    import numpy
    print(len(os.listdir("/proc/self/task")), os.environ.get("OPENBLAS_NUM_THREADS"))

main.main = command
main.run()
"""


@pytest.mark.parametrize(
    ("before", "stated"),
    [
        ("", 1),
        ("os.environ['OPENBLAS_NUM_THREADS'] = '2'", 2),
        ("os.environ['OPENBLAS_NUM_THREADS'] = '2'; import numpy", 2),
    ],
    ids=["by the quota", "as the user says", "numpy loaded before"],
)
def test_numpy_starts_as_many_threads_as_lowtide(before: str, stated: int) -> None:
    started = min(stated, len(os.sched_getaffinity(0)))  # OpenBLAS starts no more
    done = run_python(PROGRAM.replace("{before}", before))
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == f"{started} {stated}"
