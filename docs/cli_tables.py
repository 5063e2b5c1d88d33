"""An MkDocs hook: replace `::: cli COMMAND` in a page by the usage, help and options of that command."""

from __future__ import annotations

import re

import click

from lowtide.cli.main import main


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with every directive replaced; an unknown command fails the build."""
    return re.sub(r"^::: cli (.+)$", lambda found: _section(found[1]), markdown, flags=re.M)


def _section(name: str) -> str:
    """Return the heading, help, usage and options of a command, and of its subcommands."""
    context, command = click.Context(main, info_name="lowtide"), main
    for word in name.split():
        found = command.get_command(context, word) if isinstance(command, click.Group) else None
        if found is None:
            raise KeyError(f"lowtide has no command {name!r}")
        context, command = click.Context(found, info_name=word, parent=context), found
    level = "#" * (1 + len(name.split()))
    parts = [f"{level} lowtide {name}", _prose(command.help or "")]
    parts.append(f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```")
    parts.append(_options(command, context))
    if isinstance(command, click.Group):
        parts += [_section(f"{name} {child}") for child in command.list_commands(context)]
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _options(command: click.Command, context: click.Context) -> str:
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [_row(*record) for record in records if record is not None and record[1]]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def _row(names: str, text: str) -> str:
    """Return a row; characters that Markdown would read as a column or a link are escaped."""
    names, text = (" ".join(cell.split()).replace("|", "&#124;") for cell in (names, text))
    return f"| <code>{names}</code> | {text.replace('[', '&#91;')} |"
