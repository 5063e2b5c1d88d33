"""Reads prompts and chat turns from options, files, pipes and terminals: bounded, and as UTF-8."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import click

from lowtide.models.errors import BadOption

FENCE = '"""'
HISTORY_LINES = 1000


def read_text(stream: BinaryIO, name: str, limit_bytes: int) -> str:
    """Read `stream` up to one byte beyond the limit; the runtime refuses longer texts.

    Raises `BadOption` if the text is not UTF-8.
    """
    return decoded(stream.read(limit_bytes + 1), name)


def decoded(data: bytes, name: str) -> str:
    """Return the text; raises `BadOption` with the position of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(data) > 4096:
            return data.decode("utf-8", errors="ignore")  # the limit is inside a character
        raise BadOption(
            f"{name} is not UTF-8 at byte {error.start}: convert it, for example with iconv"
        ) from None


def prompt_text(prompt: str | None, file: Path | None, limit_bytes: int) -> str:
    """Return the prompt: from the option, from the file, or from standard input."""
    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --file exclude each other: use one")
    if prompt is not None:
        return prompt
    if file is not None:
        return read_file(file, limit_bytes)
    if sys.stdin.isatty():
        raise click.UsageError(
            "no prompt: use --prompt or --file, or write the prompt to standard input"
        )
    return read_text(sys.stdin.buffer, "standard input", limit_bytes)


def read_file(path: Path, limit_bytes: int) -> str:
    """Read a file like `read_text`; raises `BadOption` if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return read_text(stream, str(path), limit_bytes)
    except OSError as error:
        raise BadOption(f"cannot read {path}: {error.strerror or error}") from None


class TurnReader:
    """Reads chat turns: one line each, several lines between triple quotes, or lines joined by `\\`.

    At a terminal, lines can be edited and earlier lines recalled; with a pipe, no prompt is shown.
    """

    def __init__(self, limit_bytes: int, *, interactive: bool) -> None:
        self._limit_bytes = limit_bytes
        self._interactive = interactive
        self._history = _history_path()
        if interactive:
            self._open_history()

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
        if self._interactive:
            try:
                return input(prompt)
            except EOFError:
                return None
        data = sys.stdin.buffer.readline(self._limit_bytes + 1)
        return decoded(data, "standard input").rstrip("\r\n") if data else None

    def _open_history(self) -> None:
        try:
            import readline
        except (
            ImportError
        ):  # this Python has no readline: lines cannot be edited, but the chat works
            return
        readline.set_history_length(HISTORY_LINES)
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            if self._history.exists():
                readline.read_history_file(self._history)
        except OSError:
            return

    def close(self) -> None:
        """Save the history for the next chat."""
        if not self._interactive:
            return
        try:
            import readline

            readline.write_history_file(self._history)
        except (ImportError, OSError):
            return


def _history_path() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "lowtide" / "chat_history"
