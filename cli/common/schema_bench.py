"""`lowtide bench --schemas`: structured output over a file of JSON schemas, by each engine that is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.enforce import clean_termination
from lowtide.cli.common.options import plan_with, take_open_options

if TYPE_CHECKING:
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.benchmark.schemas.cases import EngineSummary

CONTEXT = 2048
"""Tokens of a prompt and its answer, where `--context` does not say; longer prompts lose their start."""


def measure_schemas(
    spec: ModelSpec,
    path: Path,
    attention: str,
    tokens: int,
    arguments: Mapping[str, Any],
    options: dict[str, Any],
    *,
    as_json: bool,
    enforce: bool,
) -> None:
    """Answer every schema of the file with every engine, and print a table or the JSON object."""
    from lowtide.cli.common.output import json_object, note
    from lowtide.runtime.benchmark.schemas.benchmark import run_schemas
    from lowtide.runtime.benchmark.schemas.cases import read_cases
    from lowtide.runtime.benchmark.schemas.engines import engines_here
    from lowtide.runtime.benchmark.tasks import worker_options
    from lowtide.runtime.structured.grammar.library import llguidance

    llguidance()
    cases = read_cases(path)
    context = min(CONTEXT, spec.context_length)
    options["context"] = options["context"] or context
    options |= {"attention": attention, "expected_tokens": context, "structured": True}
    planned = plan_with(spec, take_open_options(options))
    planned.require_fit()
    with clean_termination():
        found = run_schemas(
            spec,
            engines_here(spec.engine),
            cases,
            tokens,
            {**worker_options(planned), "attention": attention},
            template_arguments=arguments,
            enforced=enforce,
            progress=note,
        )
    if as_json:
        click.echo(json_object(planned, engines=[summary.to_dict() for summary in found]))
    else:
        _print(found)


def _print(summaries: Sequence[EngineSummary]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Engine", no_wrap=True)
    for heading in (
        "Schemas\ntaken",
        "Answers\nvalid",
        "Valid of\ntaken",
        "First token\nms",
        "Token\nms",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in summaries:
        share = "" if one.compliance is None else f"{one.compliance:.0%}"
        times = ("" if s is None else f"{s * 1000:.1f}" for s in (one.first_token_s, one.token_s))
        table.add_row(one.engine, f"{one.declared:.0%}", f"{one.empirical:.0%}", share, *times)
    console = Console()
    console.print(table)
    console.print(
        f"{summaries[0].schemas} schemas. Times are medians over the answers; the first token's has the prompt and the "
        "work on the schema in it.",
        highlight=False,
    )
    for one in summaries:
        if one.why_not:
            reasons = ", ".join(
                f"{reason} ({count})" for reason, count in [*one.why_not.items()][:3]
            )
            console.print(f"{one.engine} refused: {reasons}", highlight=False, soft_wrap=True)
