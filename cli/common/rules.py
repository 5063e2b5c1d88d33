"""The options for rules of answers (--avoid, --must, lengths), and the formats that they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lowtide.runtime.structured.formats import OutputFormat

RULE_OPTIONS = (
    click.option(
        "--avoid",
        multiple=True,
        metavar="TEXT|@FILE",
        help="Answer without this text; repeat the option, or name a file with a text on each line.",
    ),
    click.option(
        "--must",
        multiple=True,
        metavar="TEXT|@FILE",
        help="Answer with this text somewhere; repeat the option, or name a file with a text on each line.",
    ),
    click.option(
        "--paths",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Answer with paths of this knowledge graph only, between <PATH> and </PATH>; a line of the file has "
        "head, relation and tail with tabs or commas between them.",
    ),
    click.option(
        "--path-hops",
        type=click.IntRange(min=1),
        help="Most relations of a path.  [default: 2]",
    ),
    click.option(
        "--path-from", multiple=True, metavar="NAME", help="Begin paths here; may be repeated."
    ),
    click.option(
        "--paths-least", type=click.IntRange(min=0), help="Answer with at least so many paths."
    ),
    click.option("--path-only", is_flag=True, help="Answer with one path and no other text."),
    click.option(
        "--ltl",
        metavar="FORMULA",
        help="Answer with actions, one a line, that satisfy this formula (LTL on finite traces); --action names them.",
    ),
    click.option(
        "--action",
        "actions",
        multiple=True,
        metavar="TEXT|@FILE",
        help="An action that --ltl may list; repeat the option, or name a file with one on each line.",
    ),
    click.option(
        "--sampling",
        type=click.Choice(["masked", "asap", "awrs"]),
        help="Draw from the legal tokens (masked), weigh them by what earlier answers showed of their futures (asap), "
        "or draw by rejection, with weighted answers as particles (awrs).  [default: masked]",
    ),
    click.option(
        "--min-words", type=click.IntRange(min=0), help="Answer with at least so many words."
    ),
    click.option(
        "--max-words", type=click.IntRange(min=1), help="Answer with at most so many words."
    ),
    click.option(
        "--min-characters",
        type=click.IntRange(min=0),
        help="Answer with at least so many characters.",
    ),
    click.option(
        "--max-characters",
        type=click.IntRange(min=1),
        help="Answer with at most so many characters.",
    ),
)
_LENGTHS = ("min_words", "max_words", "min_characters", "max_characters")


def take_rules(options: dict[str, Any]) -> list[OutputFormat]:
    """Remove the options for rules from `options`; return them as formats."""
    avoid, must = options.pop("avoid"), options.pop("must")
    lengths = {name: options.pop(name) for name in _LENGTHS}
    lengths = {name: value for name, value in lengths.items() if value is not None}
    rules = [*_paths(options), *_plans(options)]
    if not (avoid or must or lengths):
        return rules
    from lowtide.runtime.structured.rules.formats import Avoid, Length, Must

    if must:
        rules.append(Must(texts_of(must, "--must")))
    if avoid:
        rules.append(Avoid(texts_of(avoid, "--avoid")))
    if lengths:
        rules.append(Length(**lengths))
    return rules


def _paths(options: dict[str, Any]) -> list[OutputFormat]:
    file, only = options.pop("paths"), options.pop("path_only")
    hops, least = options.pop("path_hops"), options.pop("paths_least")
    starts = options.pop("path_from")
    if file is None:
        if only or hops or least or starts:
            raise click.UsageError(
                "--path-hops and its like are for --paths: add a file of triples"
            )
        return []
    from lowtide.runtime.structured.rules.network_formats import MARKERS, Paths

    triples = text_of(file, "--paths")
    return [
        Paths(
            triples,
            max_hops=hops or 2,
            starts=starts,
            least=least or 0,
            markers=None if only else MARKERS,
        )
    ]


def _plans(options: dict[str, Any]) -> list[OutputFormat]:
    formula, actions = options.pop("ltl"), options.pop("actions")
    if formula is None:
        if actions:
            raise click.UsageError("--action is for --ltl: add a formula, or leave it out")
        return []
    from lowtide.runtime.structured.rules.network_formats import Ltl

    return [Ltl(formula, texts_of(actions, "--action"))]


def texts_of(values: tuple[str, ...], name: str) -> list[str]:
    """Return the texts that an option names, with those of its files in place of the files."""
    found: list[str] = []
    for value in values:
        found += lines_of(Path(value[1:]), name) if value.startswith("@") else [value]
    return found


def lines_of(path: Path, name: str) -> list[str]:
    """Return the lines of a text file that are not empty; raises `UsageError` where it cannot be read."""
    return [line for line in text_of(path, name).splitlines() if line]


def text_of(path: Path, name: str) -> str:
    """Return the text of a file of at most 64 MiB; raises `UsageError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise click.UsageError(f"{name} {path} has more than 64 MiB: split it")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.UsageError(f"{name} {path} is not UTF-8 text: convert it") from None
    except OSError as error:
        raise click.UsageError(
            f"{name} {path} cannot be read ({error.strerror}): name a readable file"
        ) from None
    except ValueError:  # a null character in the path
        raise click.UsageError(f"{name} is no path: name a readable file") from None


_MAX_FILE_BYTES = 64 << 20
