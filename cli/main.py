"""`lowtide`: finds the command's file by its name, and turns errors into sentences and exit codes.

Knows no command's insides; each is imported when it is used.
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
    """A group whose commands are files of this folder, named after them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order that a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; its `command` is the command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lowtide.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can act on becomes one sentence on stderr."""
        try:
            return super().invoke(ctx)
        except LowtideError as error:
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(130) from None


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
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
    """Run quantised language models inside a memory budget that you state in bytes.

    Exit codes: 0 done, 1 the work failed, 2 wrong use or a request that cannot be met.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(
                errors="replace"
            )  # a terminal without the character must not end the answer


def run() -> NoReturn:
    """Do what the command's words say, and end the process without its libraries' destructors.

    These read pages that nothing needed before: up to 3 MiB, beyond what was planned.
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
            "Error: the output cannot be written, as there is no space left: make room", err=True
        )
        os._exit(1)  # what is left of it cannot be written either
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read it is gone
        code = code or 1
    os._exit(code)
