"""`lowtide`: finds the module of a command by its name, and prints errors as one sentence.

A command's module is imported only when the command runs.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import sys
from typing import Any, NoReturn

import click

from lowtide.models.errors import LowtideError

COMMANDS = tuple("chat run plan profile evaluate calibrate bench models convert doctor".split())


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print a `LowtideError` as one sentence on stderr."""
        try:
            return super().invoke(ctx)
        except LowtideError as error:
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise SystemExit(130) from None


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
    try:
        main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo(
            "Error: cannot write the output, because the disk is full: free some space", err=True
        )
        os._exit(1)  # the rest cannot be written either
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has closed the pipe
        code = code or 1
    os._exit(code)
