"""Draws a profile in a process of its own: what drawing takes is not in the process whose peak was bounded.

The report goes there over a pipe, pickled: that is safe, the same program is at both ends. The page or the
picture comes back. Knows no figure.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from typing import Literal, TypeAlias

from lowtide.models.errors import LowtideError
from lowtide.runtime.profile_report import ProfileReport

Form: TypeAlias = Literal["page", "picture"]
STARTING = (
    "import sys; sys.path = [folder for folder in sys.path if folder]; "  # not the user's own folder
    "from lowtide.runtime.profile_drawing import answer; answer()"
)


def drawn(report: ProfileReport, form: Form) -> bytes:
    """Return the page as HTML in UTF-8, or the picture as PNG.

    Raises `LowtideError` with the reason where the process does not get so far.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", STARTING],
            input=pickle.dumps((report, form)),
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise _failed(form, error.strerror or str(error)) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        raise _failed(form, _signal_name(done.returncode) or said[-1])
    return done.stdout


def _failed(form: Form, reason: str) -> LowtideError:
    return LowtideError(
        f"the {form} of the profile could not be drawn ({reason}): leave it out, --json has its numbers"
    )


def _signal_name(exit_code: int) -> str:
    return f"ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""


def answer() -> None:
    """Be the process that draws: read from standard input, draw, write to standard output."""
    report, form = pickle.load(sys.stdin.buffer)
    if form == "page":
        from lowtide.runtime.profile_page import profile_page

        data = profile_page(report).encode()
    else:
        from lowtide.runtime.profile_figures import picture

        data = picture(report)
    sys.stdout.buffer.write(data)
