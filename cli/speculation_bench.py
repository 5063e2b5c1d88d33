"""What `lowtide bench --speculate` measures, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import tidy_termination
from lowtide.cli.options import plan_with, take_open_options, take_spec

if TYPE_CHECKING:
    from lowtide.runtime.speculation_bench import SpeculationCase

DEFAULT_CONTEXT = 2048
MOST_OF_A_KIND = 2


def measure_answers(
    attentions: Sequence[str],
    speculations: Sequence[str],
    prompts: Path | None,
    rounds: int,
    tokens: int,
    options: dict[str, Any],
    *,
    as_json: bool,
    enforce: bool,
) -> None:
    """Measure each draft against the plain loop, under one attention, and print the cases."""
    from lowtide.cli.summary import json_object, note
    from lowtide.models.errors import BadOption
    from lowtide.runtime.prompt_kinds import OWN_PROMPTS, read_prompts
    from lowtide.runtime.speculation_bench import SpeculationBench, check_speculations

    if len(attentions) > 1:
        raise BadOption(
            "attention names several policies, and answers are measured under one: name one"
        )
    check_speculations(speculations)
    kinds = OWN_PROMPTS if prompts is None else read_prompts(prompts, MOST_OF_A_KIND)
    spec = take_spec(options)
    options["attention"], options["speculate"] = attentions[0], speculations[0]
    options["context"] = options["context"] or min(DEFAULT_CONTEXT, spec.context_length)
    planned = plan_with(spec, take_open_options(options))
    planned.require_fit()
    opened = {
        "memory": planned.plan.budget.num_bytes,
        "context": planned.plan.context,
        "kv_type": planned.plan.kv_type,
        "threads": planned.options.num_threads,
        "max_rows": planned.plan.max_rows,
        "attention": attentions[0],
        "pack": planned.options.pack,
    }
    with (
        tidy_termination(),
        SpeculationBench(spec, speculations, opened, enforced=enforce) as bench,
    ):
        cases = bench.run(kinds, rounds=rounds, tokens=tokens, progress=note)
    if as_json:
        click.echo(json_object(planned, cases=[case.to_dict() for case in cases]))
    else:
        _print_table(cases)


def _print_table(cases: list[SpeculationCase]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kind", "draft"):
        table.add_column(name, no_wrap=True)
    for name in ("plain\ntokens/s", "drafted\ntokens/s", "ratio", "accepted", "answers"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(
            case.kind,
            case.speculate,
            f"{case.plain_decode_tokens_per_s:.1f}",
            f"{case.decode_tokens_per_s:.1f}",
            f"{case.decode_ratio:.2f}",
            f"{case.accepted} of {case.drafted}",
            "the same" if case.same else "differ",
        )
    console = Console()
    console.print(table)
    for reason in dict.fromkeys(f"{c.kind}: {c.off_reason}" for c in cases if c.off_reason):
        console.print(reason, highlight=False)
    console.print(
        f"{cases[0].attention} without drafts is plain; a ratio above 1: speculation is faster",
        highlight=False,
    )
