"""Reads prompts and chat turns from options, files, pipes and terminals: bounded, and as UTF-8."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import click

from lowtide.cli.common.streams import is_terminal
from lowtide.models.arguments.paths import shown_path
from lowtide.models.arguments.text_files import decoded
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.files.folders import STATE_VARIABLE, state_folder, unusable

if TYPE_CHECKING:
    from lowtide.runtime.planning.expected import PromptLimit

MAX_COUNTED_BYTES = 64 << 20
"""Of a text that is too long, bytes that are read to say how long it is."""
CHUNK_BYTES = 64 << 10
FENCE = '"""'
HISTORY_LINES = 1000
STDIN = "-"
"""The file name that means standard input."""


class Refusal(Protocol):
    """Makes the error for a text of `num_bytes` bytes, or of more where not all of it was read."""

    def __call__(self, num_bytes: int, *, is_whole: bool) -> LowtideError:
        """Return the error."""
        ...


def read_text(stream: BinaryIO, name: str, limit_bytes: int, refusal: Refusal | None = None) -> str:
    """Read `stream` up to one byte beyond the limit; the runtime refuses longer texts.

    With a `refusal`, that is raised for a longer text, with its true size. Raises `BadOption` if the text is not
    UTF-8.
    """
    data = stream.read(limit_bytes + 1)
    is_cut = len(data) > limit_bytes
    if is_cut and refusal is not None:
        num_bytes, is_whole = _counted(stream, len(data))
        raise refusal(num_bytes, is_whole=is_whole)
    return decoded(data, name, is_cut=is_cut)


def _counted(stream: BinaryIO, num_read: int) -> tuple[int, bool]:
    """Return how many bytes the stream has in all, and whether that is all of it: some never end."""
    while num_read < MAX_COUNTED_BYTES:
        chunk = stream.read(CHUNK_BYTES)
        if not chunk:
            return num_read, True
        num_read += len(chunk)
    return num_read, False


def prompt_text(prompt: str | None, file: Path | None, limit: PromptLimit) -> str:
    """Return the prompt: from the option, from the file, or from standard input.

    Raises `UsageError` where there is none, or nothing but white space, and `PromptTooLong` or `OverBudget` for one
    that no plan can hold.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --file exclude each other: use one")
    text = prompt
    if text is None:
        how = limit.num_bytes, limit.refusal
        text = _stdin_text(*how) if file is None else read_file(file, *how)
    if not text.strip():
        raise click.UsageError(
            "no prompt: use --prompt or --file, or write the prompt to standard input"
        )
    return text


def _stdin_text(limit_bytes: int, refusal: Refusal | None = None) -> str:
    if is_terminal(sys.stdin):
        return ""
    try:
        return read_text(sys.stdin.buffer, "standard input", limit_bytes, refusal)
    except OSError as error:
        raise BadOption(f"cannot read standard input: {error.strerror or error}") from None


def read_file(path: Path, limit_bytes: int, refusal: Refusal | None = None) -> str:
    """Read a file like `read_text`, - as standard input; raises `BadOption` if it cannot be read."""
    if str(path) == STDIN:
        return _stdin_text(limit_bytes, refusal)
    try:
        with path.open("rb") as stream:
            return read_text(stream, shown_path(path), limit_bytes, refusal)
    except (OSError, ValueError) as error:
        if isinstance(error, LowtideError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadOption(f"cannot read {shown_path(path)}: {reason}") from None


def text_lines(path: Path, limit_bytes: int) -> Iterator[str]:
    """Yield the lines of a file, - for standard input, without their ends; a longer line is cut behind the limit.

    Raises `BadOption` if the file cannot be read or is not UTF-8.
    """
    name = "standard input" if str(path) == STDIN else shown_path(path)
    try:
        with contextlib.ExitStack() as stack:
            stream = (
                sys.stdin.buffer if str(path) == STDIN else stack.enter_context(path.open("rb"))
            )
            for data in _cut_lines(stream, limit_bytes):
                yield decoded(data, name, is_cut=len(data) > limit_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, BadOption):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadOption(f"cannot read {name}: {reason}") from None


def _cut_lines(stream: BinaryIO, limit_bytes: int) -> Iterator[bytes]:
    """Yield the lines without their ends, of a longer one the first `limit_bytes` + 1 bytes."""
    while data := stream.readline(limit_bytes + 2):
        line = data.rstrip(b"\r\n")[: limit_bytes + 1]
        while not data.endswith(b"\n") and (data := stream.readline(1 << 16)):
            pass
        yield line


class TurnReader:
    """Reads chat turns: one line each, several lines between triple quotes, or lines joined by `\\`.

    At a terminal, lines can be edited and earlier lines recalled; with a pipe, no prompt is shown.
    """

    def __init__(self, limit_bytes: int, *, interactive: bool) -> None:
        self._limit_bytes = limit_bytes
        self._interactive = interactive
        self._history = _open_history() if interactive else None

    def read(self) -> str | None:
        """Return the next turn, or None at the end of input."""
        line = self._line("> ")
        if line is None:
            return None
        if line.strip().startswith(FENCE):
            return self._fenced(line.strip().removeprefix(FENCE))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._line("… ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _fenced(self, first: str) -> str:
        if first.endswith(FENCE):
            return first.removesuffix(FENCE)
        lines = [first] if first else []
        while (line := self._line("… ")) is not None:
            if line.rstrip().endswith(FENCE):
                last = line.rstrip().removesuffix(FENCE)
                lines += [last] if last else []
                break
            lines.append(line)
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        """Return the next line; None at the end, which a terminal that was closed is, too."""
        try:
            if self._interactive:
                return input(prompt)
            data = sys.stdin.buffer.readline(self._limit_bytes + 1)
        except (EOFError, OSError):
            return None
        is_cut = len(data) > self._limit_bytes
        return decoded(data, "standard input", is_cut=is_cut).rstrip("\r\n") if data else None

    def close(self) -> None:
        """Save the history for the next chat."""
        if self._history is None:
            return
        try:
            import readline

            readline.write_history_file(self._history)
        except (ImportError, OSError):
            return


def _open_history() -> Path | None:
    """Recall the lines of earlier chats; return the file of the history, None where there is none.

    A line on stderr says why it cannot be saved.
    """
    try:
        import readline
    except ImportError:  # this Python has no readline: lines cannot be edited, but the chat works
        return None
    from lowtide.cli.common.output import note

    if "GNU" in (readline.__doc__ or ""):
        # Python turns this off. Without it each pasted line is a turn, and a shell gets those behind /exit.
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(HISTORY_LINES)
    folder = state_folder()
    reason = unusable(folder, STATE_VARIABLE)
    if folder is None or reason is not None:
        note(f"The history of this chat will not be saved, because {reason}.")
        return None
    history = folder / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    return history
