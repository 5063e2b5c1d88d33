"""Repl: reads turns, answers them, and obeys the commands that begin with a slash.

Knows no options of the command line and no input device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowtide.cli.input import TurnReader
from lowtide.cli.summary import note, statistics_line
from lowtide.models.errors import LowtideError
from lowtide.runtime.transcript import Transcript

if TYPE_CHECKING:
    from lowtide.runtime import Piece, Runtime
    from lowtide.runtime.options import GenerationOptions

HELP = '''\
/help            this page
/reset           forget the conversation, keep the system message
/system [TEXT]   set the system message and start over; without TEXT, remove it
/save FILE       write the conversation to a file
/load FILE       go on with a conversation from a file
/stats           what the last answer cost, and the memory plan
/exit            leave (also Ctrl-D)

A line ending in \\ goes on in the next one; """ begins and ends a text of several lines.
Ctrl-C stops an answer.'''


class Repl:
    """One conversation with one runtime."""

    def __init__(self, runtime: Runtime, options: GenerationOptions, system: str | None) -> None:
        self._runtime = runtime
        self._options = options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._last: Piece | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: click.echo(HELP, err=True),
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._show_statistics,
        }

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, the system message first."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._turns]

    def run(self, reader: TurnReader, *, interactive: bool) -> int:
        """Go on until the input ends or /exit; return the exit code.

        At a terminal a failed turn is only told; from a pipe it also decides the exit code.
        """
        exit_code = 0
        while True:
            try:
                turn = reader.read()
                if turn is None or turn.strip() in ("/exit", "/quit"):
                    return exit_code
                self._take(turn)
            except KeyboardInterrupt:
                click.echo(err=True)
                note("/exit or Ctrl-D leaves")
            except LowtideError as error:
                click.echo(f"Error: {error}", err=True)
                exit_code = exit_code if interactive else error.exit_code

    def _take(self, turn: str) -> None:
        name, _, rest = turn.strip().partition(" ")
        if not name:
            return
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            note(f"{name} is no command: {', '.join(self._commands)} and /exit are")
        else:
            self._answer(turn)

    def _answer(self, turn: str) -> None:
        """Print the answer as it comes; what was said is kept, also when Ctrl-C cuts it short."""
        question = {"role": "user", "content": turn}
        pieces = self._runtime.chat([*self.messages, question], options=self._options)
        said: list[str] = []
        try:
            with closing(pieces):
                for piece in pieces:
                    self._last = piece
                    said.append(piece.text)
                    click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            pass
        finally:
            if said:
                self._turns += [question, {"role": "assistant", "content": "".join(said)}]
                click.echo()
        if said and self._last is not None:
            note(statistics_line(self._last.stats, self._last.finish_reason))
        else:
            note("stopped before the first token; the question is not kept")

    def _reset(self, _rest: str) -> None:
        self._turns.clear()
        note("the conversation is empty")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._turns.clear()
        note(
            "the conversation starts over " + ("with the new system message" if text else "without")
        )

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        Transcript(model=self._runtime.spec.name, messages=tuple(self.messages)).save(path)
        note(f"{len(self._turns)} messages saved to {path}")

    def _load(self, name: str) -> None:
        transcript = Transcript.load(_path(name, "/load"))
        turns = list(transcript.messages)
        self._system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        self._turns = turns
        note(f"{len(turns)} messages loaded; they are read with your next turn")
        if transcript.model != self._runtime.spec.name:
            note(f"they were answered by {transcript.model}")

    def _show_statistics(self, _rest: str) -> None:
        click.echo(str(self._runtime.plan), err=True)
        if self._last is not None:
            note(statistics_line(self._last.stats, self._last.finish_reason))


def _path(name: str, command: str) -> Path:
    from lowtide.models.errors import BadOption

    if not name:
        raise BadOption(f"{command} needs a file name: {command} talk.json")
    return Path(name).expanduser()
