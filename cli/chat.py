"""`lowtide chat`: a conversation in the terminal, or over a pipe.

Repl: reads turns, answers them, and obeys the commands that begin with a slash.

Knows no options of the command line and no input device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import enforce_option, hold
from lowtide.cli.input import TurnReader
from lowtide.cli.options import (
    generation_options,
    opening_options,
    planned_model,
    prefix_cache_option,
    speculate_option,
    take_generation_options,
)
from lowtide.cli.output import note, statistics_line
from lowtide.memory.units import format_bytes
from lowtide.models.errors import LowtideError
from lowtide.runtime.errors import OverBudget, SessionMismatch

if TYPE_CHECKING:
    from lowtide import GenerationChunk, Runtime
    from lowtide.memory.os.cgroup import ControlGroup
    from lowtide.runtime.options import SamplingParams


@click.command("chat")
@opening_options
@speculate_option
@click.option("-s", "--system", help="A system message before the conversation.")
@prefix_cache_option
@enforce_option
@generation_options
def command(system: str | None, enforce: ControlGroup | None, **options: Any) -> None:
    """Talk with a model; /help lists what you can type.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide import Runtime
    from lowtide.cli.input import TurnReader
    from lowtide.cli.output import note, plan_line
    from lowtide.memory.plan.estimates import prompt_limit_bytes

    generation = take_generation_options(options)
    planned = planned_model(options)
    planned.require_fit()
    note(plan_line(planned))
    hold(enforce, planned.plan.budget)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with Runtime.load(planned) as runtime:
        reader = TurnReader(prompt_limit_bytes(planned.plan.kv_tokens), interactive=interactive)
        repl = Repl(runtime, generation, system)
        try:
            exit_code = repl.run(reader, interactive=interactive)
        finally:
            reader.close()
    if exit_code:
        sys.exit(exit_code)


HELP = '''\
/help            this page
/reset           forget the conversation, keep the system message
/system [TEXT]   set the system message and start over; without TEXT, remove it
/save FILE       write the conversation to a file, with the KV state of its tokens
/load FILE       go on with a conversation from a file, without reading it again
/stats           what the last answer cost, and the memory plan
/exit            leave (also Ctrl-D)

A line ending in \\ goes on in the next one; """ begins and ends a text of several lines.
Ctrl-C stops an answer.'''


class Repl:
    """One conversation with one runtime."""

    def __init__(self, runtime: Runtime, options: SamplingParams, system: str | None) -> None:
        self._runtime = runtime
        self._options = options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._last: GenerationChunk | None = None
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
        with_state = ""
        try:
            saved = self._runtime.session.save(path, self.messages)
            if saved.num_tokens:
                size = format_bytes(saved.num_bytes)
                with_state = f", with the KV state of {saved.num_tokens:,} tokens ({size})"
        except OverBudget as error:
            self._runtime.session.save(path, self.messages, state=False)
            with_state = f" without their KV state, because {error}"
        note(f"{len(self._turns)} messages saved to {path}{with_state}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        reason = "they are read with your next turn"
        try:
            loaded = self._runtime.session.load(path)
            messages, model = loaded.messages, loaded.model
            if loaded.num_tokens:
                reason = f"{loaded.num_tokens:,} tokens are in the KV cache again"
            if model != self._runtime.spec.name:
                reason += f"; they were answered by {model}"
        except (SessionMismatch, OverBudget) as error:
            messages = self._runtime.session.read_messages(path)
            reason += f", because {error}"
        self._go_on_with(list(messages))
        note(f"{len(self._turns)} messages loaded; {reason}")

    def _go_on_with(self, turns: list[dict[str, str]]) -> None:
        self._system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        self._turns = turns

    def _show_statistics(self, _rest: str) -> None:
        click.echo(str(self._runtime.plan), err=True)
        if self._last is not None:
            note(statistics_line(self._last.stats, self._last.finish_reason))


def _path(name: str, command: str) -> Path:
    from lowtide.models.errors import BadOption

    if not name:
        raise BadOption(f"{command} needs a file name: {command} talk.session")
    return Path(name).expanduser()
