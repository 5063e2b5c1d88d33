"""`lowtide chat`: a conversation in the terminal or over a pipe, with commands that start with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.enforce import enforce_option, set_limit
from lowtide.cli.common.input import TurnReader
from lowtide.cli.common.options import (
    generation_options,
    opening_options,
    planned_model,
    prefix_cache_option,
    quality_option,
    speculate_option,
    system_option,
    take_generation_options,
    take_template_arguments,
    template_options,
)
from lowtide.cli.common.output import note, quality_note, statistics_line
from lowtide.cli.common.streams import is_terminal, one_line, print_answer
from lowtide.cli.common.structured import (
    reserve_constraint,
    structured_options,
    take_constraint,
)
from lowtide.memory.units import format_bytes
from lowtide.models.errors import LowtideError
from lowtide.runtime.errors import OverBudget, SnapshotMismatch

if TYPE_CHECKING:
    from lowtide import GenerationChunk, Runtime
    from lowtide.memory.os.cgroup import ControlGroup
    from lowtide.runtime.options import SamplingParams


@click.command("chat", short_help="Chat with a model.")
@opening_options
@speculate_option
@quality_option
@system_option
@template_options
@prefix_cache_option
@enforce_option
@generation_options
@structured_options
def command(system: str | None, enforce: ControlGroup | None, **options: Any) -> None:
    """Chat with a model. Type /help for the commands.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide.cli.common.input import TurnReader
    from lowtide.cli.common.output import note, plan_line, template_note
    from lowtide.cli.common.progress import load_runtime
    from lowtide.memory.plan.estimates import prompt_limit_bytes

    constraint = take_constraint(options)
    generation = replace(take_generation_options(options), constraint=constraint)
    reserve_constraint(options, generation)
    arguments = take_template_arguments(options)
    planned = planned_model(options)
    planned.require_fit()
    note(plan_line(planned))
    set_limit(enforce, planned.plan.budget)
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    with load_runtime(planned) as runtime:
        reader = TurnReader(prompt_limit_bytes(planned.plan.kv_tokens), interactive=interactive)
        template_note(runtime)
        repl = Repl(runtime, generation, system, arguments)
        try:
            exit_code = repl.run(reader, interactive=interactive)
        finally:
            reader.close()
    if exit_code:
        sys.exit(exit_code)


HELP = '''\
/help            show this help
/reset           start a new conversation with the same system message
/system [TEXT]   set the system message and start over; without TEXT, remove it
/save FILE       save the conversation to a file, together with its KV cache
/load FILE       continue a conversation from a file, without computing it again
/stats           show the memory plan and the statistics of the last answer
/exit            leave (or press Ctrl-D)

End a line with \\ to continue on the next one. Put """ before and after a text of several lines.
Press Ctrl-C to stop an answer.'''


class Repl:
    """One conversation: reads turns, answers them, and runs commands."""

    def __init__(
        self,
        runtime: Runtime,
        options: SamplingParams,
        system: str | None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._runtime = runtime
        self._options = options
        self._system = system
        self._template_arguments = template_arguments
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
        """The conversation, with the system message first."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._turns]

    def run(self, reader: TurnReader, *, interactive: bool) -> int:
        """Read turns until the input ends or /exit; return the exit code.

        A failed turn prints an error. With a pipe, it also sets the exit code.
        """
        exit_code = 0
        while True:
            try:
                turn = reader.read()
                if turn is None:
                    return exit_code
                name = command_of(turn)
                if name in ("/exit", "/quit"):
                    return exit_code
                self._take(name, turn)
            except KeyboardInterrupt:
                click.echo(err=True)
                note("Type /exit or press Ctrl-D to leave.")
            except LowtideError as error:
                click.echo(f"Error: {one_line(str(error))}", err=True)
                exit_code = exit_code if interactive else error.exit_code

    def _take(self, name: str | None, turn: str) -> None:
        if name in self._commands:
            self._commands[name](turn.strip().removeprefix(name).strip())
        elif name is not None:
            note(f"Unknown command {name}. Type /help for the list.")
        elif turn.strip():
            self._answer(turn)

    def _answer(self, turn: str) -> None:
        """Print the answer as it is generated; after Ctrl-C, the part until then stays in the conversation."""
        question = {"role": "user", "content": turn}
        chunks = self._runtime.chat(
            [*self.messages, question],
            params=self._options,
            template_arguments=self._template_arguments,
        )
        texts: list[str] = []
        try:
            with closing(chunks):
                for chunk in chunks:
                    self._last = chunk
                    texts.append(chunk.text)
                    print_answer(chunk.text)
        except KeyboardInterrupt:
            pass
        finally:
            if texts:
                self._turns += [question, {"role": "assistant", "content": "".join(texts)}]
                click.echo()
        if texts and self._last is not None:
            note(statistics_line(self._last.stats, self._last.finish_reason, self._options))
            quality_note(self._runtime.planned, self._last.stats)
        else:
            note("Stopped before the first token; the question was removed.")

    def _reset(self, _rest: str) -> None:
        self._turns.clear()
        note("Started a new conversation.")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._turns.clear()
        what = "the new" if text else "no"
        note(f"Started a new conversation with {what} system message.")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        suffix = ""
        try:
            saved = self._runtime.saved_chats.save(path, self.messages)
            if saved.num_tokens:
                size = format_bytes(saved.num_bytes)
                suffix = f", with the KV cache of {saved.num_tokens:,} tokens ({size})"
        except OverBudget as error:
            self._runtime.saved_chats.save(path, self.messages, state=False)
            suffix = f" without the KV cache, because {error}"
        note(f"Saved {len(self._turns)} messages to {path}{suffix}.")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        state = "they are computed with your next turn"
        try:
            loaded = self._runtime.saved_chats.load(path)
            messages, model = loaded.messages, loaded.model
            if loaded.num_tokens:
                state = f"{loaded.num_tokens:,} tokens restored to the KV cache"
            if model != self._runtime.spec.name:
                state += f"; the answers are from {model}"
        except (SnapshotMismatch, OverBudget) as error:
            messages = self._runtime.saved_chats.read_messages(path)
            state += f", because {error}"
        self._continue(list(messages))
        note(f"Loaded {len(self._turns)} messages; {state}.")

    def _continue(self, turns: list[dict[str, str]]) -> None:
        self._system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        self._turns = turns

    def _show_statistics(self, _rest: str) -> None:
        click.echo(str(self._runtime.plan), err=True)
        if self._last is not None:
            note(statistics_line(self._last.stats, self._last.finish_reason, self._options))


def command_of(turn: str) -> str | None:
    """Return the command of a turn, such as "/help"; None for a question.

    A text of several lines is a question, whatever it begins with: it was pasted, or written between fences. Only a
    system message may have several.
    """
    words = turn.split(maxsplit=1)
    name = words[0] if words else ""
    is_command = name.startswith("/") and name[1:].isalpha()
    return name if is_command and (name == "/system" or "\n" not in turn.strip()) else None


def _path(name: str, command: str) -> Path:
    from lowtide.models.arguments.paths import user_path
    from lowtide.models.errors import BadOption

    if not name:
        raise BadOption(f"{command} needs a file name: type {command} talk.session")
    return user_path(f"the file of {command}", name)
