"""Run a command in a process of its own and read its peak memory from the operating system.

A small process starts the command: Linux counts the memory that a process had before exec in its peak,
and the process of the tests is large.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

_LAUNCHER = """
import json, os, sys
pid = os.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
code = os.waitstatus_to_exitcode(status)
print("\\n" + json.dumps({"code": code, "peak": usage.ru_maxrss * 1024}), file=sys.stderr)
"""


@dataclass(frozen=True)
class Finished:
    """How a process ended; `peak_bytes` is its maximum resident set, as `time -v` reports it."""

    code: int
    stdout: str
    stderr: str
    peak_bytes: int


def run_measured(*command: str, stdin: bytes = b"", timeout: float = 300) -> Finished:
    """Run a command; its first word is the path of a program."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _LAUNCHER, *command],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=True,
    )
    stderr, _, last = done.stderr.decode(errors="replace").rstrip("\n").rpartition("\n")
    usage = json.loads(last)
    return Finished(usage["code"], done.stdout.decode(errors="replace"), stderr, usage["peak"])


def run_lowtide(*arguments: str, stdin: bytes = b"", timeout: float = 300) -> Finished:
    """Run `lowtide` as a user does."""
    program = "from lowtide.cli.main import run; run()"
    return run_measured(sys.executable, "-c", program, *arguments, stdin=stdin, timeout=timeout)


def run_python(code: str, timeout: float = 300) -> Finished:
    """Run a Python program."""
    return run_measured(sys.executable, "-c", code, timeout=timeout)
