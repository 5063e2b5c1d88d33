"""`lowtide`: finds the module of a command by its name, and prints errors as one sentence.

A command's module is imported only when the command runs.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import sys
import warnings
from functools import partial
from typing import Any, NoReturn

import click

from lowtide.cli.common.streams import one_line, prepare_streams, print_warning
from lowtide.memory.os.numpy_threads import limit_numpy_threads
from lowtide.models.arguments.names import on_command_line
from lowtide.models.errors import LowtideError, LowtideWarning

COMMANDS = tuple(
    "chat run serve embed plan profile evaluate calibrate bench models convert doctor".split()
)


class CommandLine(click.Group):
    """A group of commands; each is a module of this folder with the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a new user needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its `command`."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lowtide.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name the nearest one where there is none of this name."""
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in COMMANDS:
            ctx.fail(f"there is no command {args[0]!r}: did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print a `LowtideError` as one sentence on stderr."""
        try:
            with on_command_line(_spelling), warnings.catch_warnings():
                warnings.showwarning = partial(print_warning, standard=warnings.showwarning)
                warnings.simplefilter("always", LowtideWarning)
                return super().invoke(ctx)
        except LowtideError as error:
            click.echo(f"Error: {one_line(str(error))}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise SystemExit(130) from None


def _spelling(name: str) -> str | None:
    """Return how the running command writes the option; None if it does not have it."""
    context = click.get_current_context(silent=True)
    while context is not None:
        for parameter in context.command.params:
            if parameter.name in (name, *_SPELLED.get(name, ())):
                return next((o for o in parameter.opts if o.startswith("--")), parameter.opts[0])
        context = context.parent
    return None


_SPELLED = {
    "attention": ("attentions",),
    "speculate": ("speculations",),
    "model": ("model_option",),
    "api_key": ("api_keys",),
    "cors_origin": ("cors_origins",),
}
"""The names of options that some commands store under another name."""


def _print_version(ctx: click.Context, _parameter: click.Parameter, enabled: bool) -> None:
    if enabled:
        import lowtide

        click.echo(f"lowtide {lowtide.__version__}")
        ctx.exit()


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Run quantised language models inside a memory budget that you set.

    Exit codes: 0 success; 1 failure; 2 wrong use, or a request that does not fit.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(
                errors="replace"
            )  # a character that the terminal lacks must not be an error


def run() -> NoReturn:
    """Run the command line, and end the process without the destructors of its libraries.

    The destructors would make up to 3 MiB of pages resident that the plan does not contain.
    """
    prepare_streams()
    limit_numpy_threads()
    try:
        main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except OSError as error:
        click.echo(f"Error: {one_line(_system_error(error))}", err=True)
        atexit._run_exitfuncs()
        os._exit(1)  # the rest of the output cannot be written either
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has closed the pipe
        code = code or 1
    os._exit(code)


def _system_error(error: OSError) -> str:
    """Return what the system refused, and what to change."""
    if error.errno == errno.ENOSPC and error.filename is None:
        return "cannot write the output, because the disk is full: free some space"
    what = f"{error.filename} cannot be used" if error.filename else "cannot write the output"
    return f"{what} ({error.strerror or error})"
