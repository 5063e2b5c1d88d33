"""The command line with streams that are closed, full or without a reader, as services start programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROGRAM = "from lowtide.cli.main import run; run()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", chat_template=TEMPLATE)


def started(redirection: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run `lowtide` with the redirections of a shell."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-c", PROGRAM, *arguments))
    return subprocess.run(
        ["bash", "-c", f"{words} {redirection}"], capture_output=True, timeout=120
    )


def answered(model: Path, *arguments: str) -> tuple[str, ...]:
    return ("run", str(model), "-n", "4", "--temp", "0", "--memory", "1GiB", *arguments)


@pytest.mark.parametrize(
    "closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "<&- 2>&-"]
)
def test_a_right_answer_exits_with_0_and_no_prompt_with_2(model: Path, closed: str) -> None:
    done = started(closed, *answered(model, "-p", "Hi"))
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (">&-" in closed.replace("2>&-", "")) == (not done.stdout)
    done = started(closed if "<" in closed else f"{closed} </dev/null", *answered(model))
    assert done.returncode == 2
    assert b"no prompt" in done.stderr or "2>" in closed


def test_a_file_is_not_opened_as_a_standard_stream(model: Path, tmp_path: Path) -> None:
    """With closed streams the first files that a process opens would have their descriptors."""
    code = (
        "import os; from lowtide import Runtime\n"
        f"runtime = Runtime.open({str(model)!r}, memory='1GiB')\n"
        "names = [os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)]\n"
        f"open({str(tmp_path / 'names')!r}, 'w').write(' '.join(names))\n"
    )
    subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code], timeout=120, check=True
    )
    assert (tmp_path / "names").read_text().split() == [os.devnull] * 3


def test_what_standard_output_does_not_take_is_an_error(model: Path) -> None:
    done = started(">/dev/full", *answered(model, "-p", "Hi"))
    assert done.returncode == 1
    assert b"the disk is full" in done.stderr and b"Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_the_command_without_a_traceback(model: Path) -> None:
    done = started("| head -c 0", *answered(model, "-p", "Hi"))
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [("--help",), ("models",), ("chat", "MODEL"), ("plan", "MODEL")]
)
def test_other_commands_without_streams(model: Path, command: tuple[str, ...]) -> None:
    words = [str(model) if word == "MODEL" else word for word in command]
    assert started("<&- >&- 2>&-", *words).returncode == 0
