"""The options for structured output, and the format that they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lowtide.cli.common.rules import RULE_OPTIONS, take_rules

if TYPE_CHECKING:
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.structured.formats import OutputFormat

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--json-schema",
        "--schema",
        "json_schema",
        metavar="FILE|JSON",
        help="Answer with JSON that follows this schema: a file, or the schema itself.",
    ),
    click.option("--json-object", is_flag=True, help="Answer with a JSON object of any kind."),
    click.option(
        "--regex",
        metavar="PATTERN",
        help="Answer with a text that this pattern matches as a whole.",
    ),
    click.option(
        "--grammar",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Answer in this grammar: GBNF as llama.cpp reads it, or Lark.",
    ),
    click.option(
        "--choice",
        "choices",
        multiple=True,
        metavar="TEXT",
        help="Answer with this text; repeat the option for each of the choices.",
    ),
    click.option(
        "--json-style",
        type=click.Choice(["flexible", "compact", "pretty"]),
        help="White space in JSON: up to 8 characters between values, none, or one blank after each comma and "
        "colon.  [default: flexible]",
    ),
    click.option(
        "--schema-check",
        type=click.Choice(["exact", "verified"]),
        help="Refuse a schema with keywords that no grammar has, or verify complete answers and try wrong ones "
        "again.  [default: exact]",
    ),
    click.option(
        "--reason",
        type=click.IntRange(min=1),
        metavar="N",
        help="Reason first, in free text of at most N tokens; what the answer must look like holds for what follows.",
    ),
    click.option(
        "--reason-end",
        metavar="TEXT",
        help="The text that ends the reasoning.  [default: </think> where the model has a token for it, else Answer:]",
    ),
)

structured_option = click.option(
    "--structured",
    is_flag=True,
    help="Plan with the memory of structured output, as --json-schema and its like do.",
)


def structured_options(command: Command) -> Command:
    """Add --json-schema, --regex and the other options that say what an answer must look like."""
    for decorator in reversed((*_OPTIONS, *RULE_OPTIONS)):
        command = decorator(command)
    return command


def take_constraint(options: dict[str, Any]) -> OutputFormat | None:
    """Remove the options of structured output from `options`; return the format, None where none was asked for."""
    names = ("json_schema", "json_object", "regex", "grammar", "choices")
    values = {name: options.pop(name) for name in names}
    style, check = options.pop("json_style"), options.pop("schema_check")
    used = [name for name in names if values[name] not in (None, False, ())]
    if len(used) > 1:
        written = " and ".join(_written(name) for name in used)
        raise click.UsageError(f"{written} say what the answer must look like: name one of them")
    if style is not None and used not in (["json_schema"], ["json_object"]):
        raise click.UsageError(
            "--json-style is for JSON answers: add --json-schema or --json-object, or leave it out"
        )
    if check is not None and used != ["json_schema"]:
        raise click.UsageError("--schema-check is for schemas: add --json-schema, or leave it out")
    reason, reason_end = options.pop("reason"), options.pop("reason_end")
    formats = take_rules(options)
    if used:
        formats.insert(0, _format(used[0], values[used[0]], style or "flexible", check or "exact"))
    found = formats[0] if formats else None
    if len(formats) > 1:
        from lowtide.runtime.structured.rules.formats import AllOf

        found = AllOf(*formats)
    return found if reason is None and reason_end is None else _reasoned(found, reason, reason_end)


def _reasoned(found: OutputFormat | None, reason: int | None, end: str | None) -> OutputFormat:
    """Return the format with reasoning before it."""
    if reason is None:
        raise click.UsageError("--reason-end is for --reason: add it, or leave this out")
    if found is None:
        raise click.UsageError(
            "--reason comes before an answer that must look like something: add --json-schema or its like"
        )
    from lowtide.runtime.structured.reasoning.reason_first import ReasonFirst

    return ReasonFirst(found, reason, end=end)


def reserve_constraint(options: dict[str, Any], params: SamplingParams) -> None:
    """Add to `options` what the constraint of `params` takes beside the model."""
    constraint = params.constraint
    options["structured"] = constraint is not None and constraint.needs_grammar
    options["rules_bytes"] = 0
    if constraint is not None:
        from lowtide.runtime.structured.aligned.aligned import held_bytes

        options["rules_bytes"] = held_bytes(constraint.num_bytes, params.sampling)


def _format(name: str, value: Any, style: str, check: str) -> OutputFormat:
    from lowtide.runtime.structured.formats import Choice, Grammar, JsonObject, JsonSchema, Regex

    if name == "json_schema":
        return JsonSchema(_schema_text(value), style, check)
    if name == "json_object":
        return JsonObject(style)
    if name == "regex":
        return Regex(value)
    if name == "grammar":
        return Grammar(_read(value, "--grammar"))
    return Choice(*value) if len(value) > 1 else Choice([*value])


def _schema_text(value: str) -> str:
    if value.lstrip()[:1] in ("{", "[") or value.strip() in ("true", "false"):
        return value
    return _read(Path(value), "--json-schema")


def _read(path: Path, name: str) -> str:
    from lowtide.runtime.structured.formats import MAX_SOURCE_BYTES

    try:
        with path.open("rb") as file:
            data = file.read(MAX_SOURCE_BYTES + 1)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if len(data) > MAX_SOURCE_BYTES:  # the cut may be inside a character
            return data.decode("utf-8", errors="replace")
        raise click.UsageError(f"{name} {path} is not UTF-8 text: convert it") from None
    except OSError as error:
        raise click.UsageError(
            f"{name} {path} cannot be read ({error.strerror}): name a readable file"
        ) from None
    except ValueError:  # a null character in the path
        raise click.UsageError(f"{name} is no path: name a readable file") from None


def _written(name: str) -> str:
    return "--choice" if name == "choices" else "--" + name.replace("_", "-")
