"""--enforce over the real kernel and model: what goes through, what is held, what is left behind."""

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

Invoke = Callable[..., Result]
real = pytest.mark.skipif(bool(reason_against_enforcing()), reason=reason_against_enforcing())
SMALL = ("--memory", "200MiB", "-c", "512", "--temp", "0", "-t", "1")
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell may ignore it
    "from lowtide.cli.main import run; run()"
)


def groups_left() -> list[Path]:
    """The groups whose makers are gone; others may be running beside us."""
    _, parents = control_group._parents(PROC, CGROUP_ROOT)
    found = [folder for parent in parents for folder in parent.glob("lowtide-*")]
    return [folder for folder in found if not (PROC / folder.name.split("-")[1]).exists()]


def test_where_no_group_can_be_made_nothing_is_run(
    lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ControlGroup.make
    monkeypatch.setattr(ControlGroup, "make", lambda **_: make(tmp_path, tmp_path))
    for command in (("run", "-p", "Hi"), ("chat",), ("evaluate",), ("bench", "-d", "16")):
        done = lowtide(*command, "--enforce", input="Hi\n")
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: --enforce needs the control groups of Linux")
        assert done.stderr.count("\n") == 1
    assert not lowtide.models  # type: ignore[attr-defined]


@real
def test_at_the_lower_bound_the_answer_is_the_same_and_nothing_is_killed() -> None:
    refused = run_lowtide("run", "--enforce", "--memory", "40MiB", "-p", "Hi")
    assert (refused.code, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr
    # Stated, or what is measured decides between two contexts and types that answer otherwise.
    shape = ("-c", "512", "--kv-type", "q4_0", "-t", "1")
    plan = json.loads(run_lowtide("plan", *shape, "--memory", "1GiB", "--json").stdout)
    least = -(-plan["lower_bound_bytes"] // MIB) + 1
    bound = f"{least}MiB"
    arguments = (*shape, "--temp", "0", "-n", "48", "--memory", bound)
    question = b"Why is the sea salty?"
    plain = run_lowtide("run", *arguments, stdin=question)
    held = run_lowtide("run", "--enforce", *arguments, stdin=question)
    assert (held.code, held.stdout) == (plain.code, plain.stdout) == (0, plain.stdout)
    assert held.peak_bytes <= least * MIB
    assert "the kernel ends this process" in held.stderr
    below = run_lowtide("run", "--enforce", *shape, "--memory", f"{least - 8}MiB", "-p", "Hi")
    assert below.code == 2 and "needs at least" in below.stderr
    assert not groups_left()


@real
def test_a_shares_budget_is_of_the_machine_and_not_of_the_group() -> None:
    told = run_lowtide("run", "--enforce", "--memory", "50%", "-c", "512", "-n", "2", "-p", "Hi")
    assert told.code == 0, told.stderr
    assert "Warning" not in told.stderr and "GiB (stated: 50%)" in told.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(write_model(folder / "random.gguf", layers=4, width=128, heads=2, kv_heads=1))


@real
def test_evaluate_measures_the_same_inside_the_limit(model: str) -> None:
    arguments = ("evaluate", model, "--memory", "160MiB", "-c", "512", "--windows", "1")
    arguments += ("--no-passkeys", "-t", "1", "--attention", "tidal:k=100,layers=1", "--json")
    plain, held = (run_lowtide(*arguments, *more) for more in ((), ("--enforce",)))
    assert (plain.code, held.code) == (0, 0), plain.stderr + held.stderr
    assert json.loads(held.stdout)["kl"] == json.loads(plain.stdout)["kl"] > 0
    assert "above 166.5 MiB the kernel ends this process" in held.stderr
    refused = run_lowtide(*arguments, "--memory", "30MiB", "--enforce")
    assert (refused.code, refused.stdout) == (2, "") and "needs at least" in refused.stderr
    assert not groups_left()


@real
def test_each_case_of_a_bench_is_inside_the_limit(model: str) -> None:
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
def test_a_bench_that_is_ended_leaves_no_group(
    number: signal.Signals, code: int, model: str
) -> None:
    arguments = ("bench", model, "--memory", "160MiB", "-d", "100", "--rounds", "100", "-n", "2")
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments, "-t", "1", "--enforce"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr and "round 1 of 100" in process.stderr.readline()
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == code
    assert not groups_left()


GREEDY = """
from lowtide.cli.main import main
from lowtide import Runtime
blocks = []
chat = Runtime.chat
def growing(self, messages, **options):
    for piece in chat(self, messages, **options):
        yield piece
        blocks.append(bytearray(b"x") * (16 << 20))
Runtime.chat = growing
from lowtide.runtime.generation.watchdog import Watchdog
Watchdog.is_over = lambda self: False  # nobody watches but the kernel
main()
"""


@real
def test_what_passes_the_limit_is_killed_and_told_in_a_sentence(smollm2: Path) -> None:
    done = run_measured(
        sys.executable, "-c", GREEDY, "run", "--enforce", "-p", "Count.", "-n", "60", *SMALL
    )
    assert done.code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: the kernel ended lowtide at the enforced limit of 207.1 MiB")
    # The weights and the libraries count only for whoever was the first to read their files.
    assert done.peak_bytes <= (208 + 32) * MIB + smollm2.stat().st_size
    assert not groups_left()


@real
def test_wrong_use_goes_through() -> None:
    done = run_lowtide("run", "--enforce", "-p", "x", "-f", "y", *SMALL)
    assert done.code == 2 and "both --prompt and --file" in done.stderr
    assert not groups_left()


@contextmanager
def chatting() -> Iterator[subprocess.Popen[str]]:
    """A chat under --enforce, over pipes, that has answered once."""
    with subprocess.Popen(
        [sys.executable, "-c", START, "chat", "--enforce", "-n", "4", *SMALL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        deadline = threading.Timer(90, process.kill)  # reading from it must not wait for ever
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
def test_signals_reach_the_child() -> None:
    with chatting() as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr and process.stdin
        assert any("/exit or Ctrl-D leaves" in line for line in process.stderr)
        process.stdin.close()
        assert process.wait(20) == 0
    with chatting() as process:
        child = child_of(process.pid)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert not is_running(child)
    assert not groups_left()


@real
def test_a_killed_parent_leaves_no_child_and_the_next_run_clears_up(tmp_path: Path) -> None:
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
    while groups_left() and time.monotonic() < until:  # the kernel may still be at the child's end
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
    os.write(terminal, b"\\x03")  # readline sees one that came too early at the next key
until("leaves")
until("> ")
os.write(terminal, b"Again\\n")
until("reused")
until("> ")
os.write(terminal, b"\\x04")
_, status = os.waitpid(pid, 0)
print("exit code", os.waitstatus_to_exitcode(status))
"""


@real
def test_a_terminal_keeps_working() -> None:
    done = run_python(TERMINAL.format(start=START, small=SMALL), timeout=60)
    assert done.code == 0, done.stderr
    assert done.stdout.count("/exit or Ctrl-D leaves") == 1  # Ctrl-C came once, and ended nobody
    assert done.stdout.endswith("exit code 0\n")
    assert not groups_left()
