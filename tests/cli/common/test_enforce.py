"""--enforce with the real kernel and a real model: answers, limits, signals, and cleaning up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from control_groups import reason_against_enforcing
from gguf_files import write_model
from processes import run_lowtide, run_measured, run_python

from lowtide.memory.machine import CGROUP_ROOT, PROC
from lowtide.memory.os import cgroup as control_group
from lowtide.memory.os.cgroup import ControlGroup
from lowtide.memory.units import MIB

pytestmark = pytest.mark.real

Invoke = Callable[..., Result]
real = pytest.mark.skipif(bool(reason_against_enforcing()), reason=reason_against_enforcing())
SMALL = ("--memory", "200MiB", "-c", "512", "--temp", "0", "-t", "1")
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell may ignore SIGINT
    "from lowtide.cli.main import run; run()"
)


def groups_left() -> list[Path]:
    """Return the groups of dead processes; other tests may be running at the same time."""
    _, parents = control_group._parents(PROC, CGROUP_ROOT)
    found = [folder for parent in parents for folder in parent.glob("lowtide-*")]
    return [folder for folder in found if not (PROC / folder.name.split("-")[1]).exists()]


def test_nothing_runs_if_no_group_can_be_created(
    lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ControlGroup.make
    monkeypatch.setattr(ControlGroup, "make", lambda **_: make(tmp_path, tmp_path))
    for command in (("run", "-p", "Hi"), ("chat",), ("evaluate",), ("bench", "-d", "16")):
        done = lowtide(*command, "--enforce", input="Hi\n")
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: --enforce needs Linux control groups")
        assert done.stderr.count("\n") == 1
    assert not lowtide.models  # type: ignore[attr-defined]


@real
def test_the_answer_is_the_same_at_the_lower_bound() -> None:
    refused = run_lowtide("run", "--enforce", "--memory", "40MiB", "-p", "Hi")
    assert (refused.code, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr
    # Fixed, because measurements could decide between contexts and types with different answers.
    shape = ("-c", "512", "--kv-type", "q4_0", "-t", "1")
    plan = json.loads(run_lowtide("plan", *shape, "--memory", "1GiB", "--json").stdout)
    least = -(-plan["lower_bound_bytes"] // MIB) + 1
    bound = f"{least}MiB"
    arguments = (*shape, "--temp", "0", "-n", "48", "--memory", bound)
    question = b"Why is the sea salty?"
    plain = run_lowtide("run", *arguments, stdin=question)
    enforced = run_lowtide("run", "--enforce", *arguments, stdin=question)
    assert (enforced.code, enforced.stdout) == (plain.code, plain.stdout) == (0, plain.stdout)
    assert enforced.peak_bytes <= least * MIB
    assert "Enforced: the kernel kills this process above" in enforced.stderr
    below = run_lowtide("run", "--enforce", *shape, "--memory", f"{least - 8}MiB", "-p", "Hi")
    assert below.code == 2 and "needs at least" in below.stderr
    assert not groups_left()


@real
def test_a_percentage_refers_to_the_machine_and_not_to_the_group() -> None:
    done = run_lowtide("run", "--enforce", "--memory", "50%", "-c", "512", "-n", "2", "-p", "Hi")
    assert done.code == 0, done.stderr
    assert "Warning" not in done.stderr and "GiB (set to 50%)" in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(write_model(folder / "random.gguf", layers=4, width=128, heads=2, kv_heads=1))


@real
def test_evaluate_reports_the_same_within_the_limit(model: str) -> None:
    arguments = ("evaluate", model, "--memory", "160MiB", "-c", "512", "--windows", "1")
    arguments += ("--no-passkeys", "-t", "1", "--attention", "tidal:k=100,layers=1", "--json")
    plain, enforced = (run_lowtide(*arguments, *more) for more in ((), ("--enforce",)))
    assert (plain.code, enforced.code) == (0, 0), plain.stderr + enforced.stderr
    assert json.loads(enforced.stdout)["kl"] == json.loads(plain.stdout)["kl"] > 0
    assert "the kernel kills this process above 166.5 MiB" in enforced.stderr
    refused = run_lowtide(*arguments, "--memory", "30MiB", "--enforce")
    assert (refused.code, refused.stdout) == (2, "") and "needs at least" in refused.stderr
    assert not groups_left()


@real
def test_each_process_of_a_benchmark_is_within_the_limit(model: str) -> None:
    arguments = ("bench", model, "--memory", "160MiB", "-d", "100", "--rounds", "1", "-n", "2")
    done = run_lowtide(*arguments, "-t", "1", "--attention", "dense", "--enforce", "--json")
    assert done.code == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert max(case["peak_rss_bytes"], case["peer_peak_rss_bytes"]) <= 160 * MIB
    assert not groups_left()


@real
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_terminated_benchmark_leaves_no_group(
    number: signal.Signals, code: int, model: str
) -> None:
    arguments = ("bench", model, "--memory", "160MiB", "-d", "100", "--rounds", "100", "-n", "2")
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments, "-t", "1", "--enforce"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr and "100 rounds" in process.stderr.readline()
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == code
    assert not groups_left()


GROWING = """
from lowtide.cli.main import main
from lowtide import Runtime
blocks = []
chat = Runtime.chat
def chat_and_grow(self, messages, **options):
    for chunk in chat(self, messages, **options):
        yield chunk
        blocks.append(bytearray(b"x") * (16 << 20))
Runtime.chat = chat_and_grow
from lowtide.runtime.generation.watchdog import Watchdog
Watchdog.is_over = lambda self: False  # only the kernel watches
main()
"""


@real
def test_a_process_over_the_limit_is_killed_with_one_error_sentence(smollm2: Path) -> None:
    done = run_measured(
        sys.executable, "-c", GROWING, "run", "--enforce", "-p", "Count.", "-n", "60", *SMALL
    )
    assert done.code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: the kernel killed lowtide at the enforced limit of 207.1 MiB")
    # The files of weights and libraries are charged only to the process that read them first.
    assert done.peak_bytes <= (208 + 32) * MIB + smollm2.stat().st_size
    assert not groups_left()


@real
def test_the_exit_code_of_wrong_use() -> None:
    done = run_lowtide("run", "--enforce", "-p", "x", "-f", "y", *SMALL)
    assert done.code == 2 and "--prompt and --file exclude each other" in done.stderr
    assert not groups_left()


@contextmanager
def chatting() -> Iterator[subprocess.Popen[str]]:
    """Yield a chat with --enforce and pipes that has answered once."""
    with subprocess.Popen(
        [sys.executable, "-c", START, "chat", "--enforce", "-n", "4", *SMALL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        deadline = threading.Timer(90, process.kill)  # reading from it must not block forever
        deadline.start()
        process.stdin.write("Hi\n")
        process.stdin.flush()
        try:
            assert process.stdout.readline().strip()
            assert process.stderr and any("tokens/s" in line for line in process.stderr)
            yield process
        finally:
            deadline.cancel()
            process.kill()


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@real
def test_signals_are_forwarded_to_the_child() -> None:
    with chatting() as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr and process.stdin
        assert any("press Ctrl-D to leave" in line for line in process.stderr)
        process.stdin.close()
        assert process.wait(20) == 0
    with chatting() as process:
        child = child_of(process.pid)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert not is_running(child)
    assert not groups_left()


@real
def test_a_killed_parent_leaves_no_child_and_the_next_run_removes_its_group(tmp_path: Path) -> None:
    with chatting() as process:
        child = child_of(process.pid)
        (tmp_path / "self").symlink_to(f"/proc/{child}")
        group = ControlGroup.joined(process.pid, tmp_path)
        assert group is not None and group.folder.exists()
        process.kill()
        process.wait(20)
        until = time.monotonic() + 20
        while is_running(child) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_running(child)
    assert group.folder in groups_left()
    while groups_left() and time.monotonic() < until:  # the kernel may still be removing the child
        ControlGroup.make().remove()
        time.sleep(0.05)
    assert not groups_left()


TERMINAL = """
import os, pty, select, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-c", {start!r}, "chat", "--enforce", "-n", "4", *{small!r}])
seen = ""
def until(text):
    global seen
    while text not in seen:
        seen += os.read(terminal, 4096).decode(errors="replace")
    before, _, seen = seen.partition(text)
    print(before + text, end="")
until("> ")
os.write(terminal, b"Hi\\n")
until("tokens/s")
until("> ")
os.write(terminal, b"\\x03")
while not select.select([terminal], [], [], 5)[0]:
    os.write(terminal, b"\\x03")  # readline notices an early Ctrl-C only at the next key
until("to leave.")
until("> ")
os.write(terminal, b"Again\\n")
until("reused")
until("> ")
os.write(terminal, b"\\x04")
_, status = os.waitpid(pid, 0)
print("exit code", os.waitstatus_to_exitcode(status))
"""


@real
def test_a_terminal_works_as_without_enforce() -> None:
    done = run_python(TERMINAL.format(start=START, small=SMALL), timeout=60)
    assert done.code == 0, done.stderr
    assert (
        done.stdout.count("press Ctrl-D to leave") == 1
    )  # Ctrl-C arrived once and ended no process
    assert done.stdout.endswith("exit code 0\n")
    assert not groups_left()
