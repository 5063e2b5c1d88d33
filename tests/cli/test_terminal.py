"""What a terminal would obey is shown, not obeyed; and which turns of a chat are commands."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide import FakeModel, Runtime
from lowtide.cli.chat import command_of
from lowtide.cli.common.streams import visible

HOSTILE = "\x1b]52;c;cm0=\x07\x1b[2J\rdone\x9b1m"
ANSWER = """
import sys
from lowtide import FakeModel, Runtime, SamplingParams
from lowtide.cli.chat import Repl
from lowtide.cli.common.input import TurnReader
from lowtide.cli.common.streams import prepare_streams
prepare_streams()
with Runtime.open(FakeModel(({reply!r},))) as runtime:
    Repl(runtime, SamplingParams(), None).run(TurnReader(10_000, interactive=False), interactive=False)
"""


def _in_terminal(*command: str, stdin: bytes = b"") -> bytes:
    """Return what a terminal gets from a command; its input is a pipe."""
    reading, writing = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(reading, 0)
        os.close(writing)
        os.execv(command[0], command)
    os.close(reading)
    os.write(writing, stdin)
    os.close(writing)
    shown = b""
    while select.select([terminal], [], [], 300)[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the command has ended
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    return shown


def test_an_answer_does_not_control_the_terminal() -> None:
    program = ANSWER.format(reply=HOSTILE)
    shown = _in_terminal(sys.executable, "-c", program, stdin=b"Hi\n").decode()
    assert r"\x1b]52;c;cm0=\x07\x1b[2J\x0ddone\x9b1m" in shown
    assert "\x1b]" not in shown and "\x1b[2J" not in shown


def test_an_answer_in_a_file_is_what_the_model_wrote(tmp_path: Path) -> None:
    import subprocess

    program = ANSWER.format(reply=HOSTILE)
    done = subprocess.run(
        [sys.executable, "-c", program], input=b"Hi\n", capture_output=True, check=True, timeout=300
    )
    assert done.stdout.decode() == HOSTILE + "\n"


def test_a_models_name_does_not_control_the_terminal(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", name="\x1b]0;owned\x07" + "x" * 500)
    program = "from lowtide.cli.main import run; run()"
    shown = _in_terminal(
        sys.executable, "-c", program, "plan", str(path), "--memory", "300MiB"
    ).decode()
    assert r"\x1b]0;owned\x07xxx" in shown and "\x1b]0" not in shown
    assert "x" * 200 not in shown


def test_lines_and_tabs_stay() -> None:
    assert visible("a\n\tb é 👨‍👩‍👧") == "a\n\tb é 👨‍👩‍👧"
    assert visible("\x00\x7f\x85\r") == r"\x00\x7f\x85\x0d"


@pytest.mark.parametrize(
    ("turn", "command"),
    [
        ("/exit", "/exit"),
        ("  /exit now ", "/exit"),
        ("/frobnicate", "/frobnicate"),
        ("/usr/bin is a folder", None),
        ("what is /exit?", None),
        ("/exit\nis a command", None),
        ("/save x\n/exit", None),
        ("/system You are kind.\nYou are brief.", "/system"),
        ("/exit\n", "/exit"),
        ("", None),
        ("\n", None),
    ],
)
def test_commands_are_single_lines(turn: str, command: str | None) -> None:
    assert command_of(turn) == command


def test_a_pasted_text_that_begins_with_a_command_is_a_question() -> None:
    from lowtide import SamplingParams
    from lowtide.cli.chat import Repl

    with Runtime.open(FakeModel(("One.", "Two."))) as runtime:
        repl = Repl(runtime, SamplingParams(), None)

        class Pasted:
            turns = iter(["/reset\nis a command of this chat", "/exit"])

            def read(self) -> str | None:
                return next(self.turns, None)

        assert repl.run(Pasted(), interactive=True) == 0  # type: ignore[arg-type]
        assert [m["content"] for m in repl.messages] == [
            "/reset\nis a command of this chat",
            "One.",
        ]


PASTED_INTO = """
import sys
from lowtide import FakeModel, Runtime, SamplingParams
from lowtide.cli.chat import Repl
from lowtide.cli.common.input import TurnReader
with Runtime.open(FakeModel(("A long answer.", "Another one."))) as runtime:
    repl = Repl(runtime, SamplingParams(), None)
    code = repl.run(TurnReader(10_000, interactive=True), interactive=True)
    print("turns", [message["content"] for message in repl.messages])
sys.exit(code)
"""


def test_lines_that_are_pasted_are_one_turn(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", PASTED_INTO], environment)
    _read_until(terminal, rb"> $")
    os.write(terminal, b"\x1b[200~/exit\ntouch x\x1b[201~\r")
    _read_until(terminal, rb"A long answer\.[\s\S]*> $")
    os.write(terminal, b"\x04")
    shown = _read_until(terminal, rb"\]\r\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert b"turns ['/exit\\ntouch x', 'A long answer.']" in shown


def _read_until(terminal: int, pattern: bytes) -> bytes:
    shown = b""
    while not re.search(pattern, shown):
        assert select.select([terminal], [], [], 60)[0], shown
        shown += os.read(terminal, 65536)
    return shown
