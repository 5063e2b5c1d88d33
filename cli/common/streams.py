"""The standard streams of the command line, which a service may start closed, full or without a reader."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

from lowtide.memory.os.descriptors import hold_standard_descriptors
from lowtide.models.errors import LowtideWarning


def prepare_streams() -> None:
    """Make the three streams usable, whatever the process was started with.

    A closed stream becomes the null device: no input, and nobody reads what is written. Notes and errors that
    standard error does not take are lost; the answer on standard output is not.
    """
    hold_standard_descriptors()
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    before = sys.stderr
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_NoteWriter(2, "w", closefd=False)),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class _NoteWriter(io.FileIO):
    """A descriptor whose write errors are ignored: its disk is full, or its reader has left."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def print_warning(
    message: Warning | str, category: type[Warning], *rest: Any, standard: Callable[..., None]
) -> None:
    """Print a warning of lowtide's as one line; others as `standard` prints them."""
    if issubclass(category, LowtideWarning):
        click.secho(visible(f"Note: {message}"), dim=True, err=True)
    else:
        standard(message, category, *rest)


def one_line(text: str) -> str:
    """Return a message with its control characters, such as those of a path, as they are escaped in Python."""
    return "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)


_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    """Return a text with its control characters, but line ends and tabs, as they are escaped in Python.

    A terminal obeys them: it would move the cursor over earlier lines, or fill the clipboard.
    """
    return text.translate(_CONTROLS)


def print_answer(text: str) -> None:
    """Print a part of an answer at once: as it is, but for control characters where a terminal would obey them."""
    sys.stdout.write(visible(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal; False for one that is closed."""
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False
