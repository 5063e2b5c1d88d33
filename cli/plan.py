"""`lowtide plan`: the memory plan of a model, from its headers alone.

A wrong number in the table is found in three files: this one prints `str(plan)`; the line's method in
memory/plan/lines.py sums its terms; memory/plan/estimates.py has the formula of each term.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.options import (
    json_option,
    opening_options,
    planned_model,
    prefix_cache_option,
    quality_option,
    speculate_option,
)
from lowtide.cli.common.streams import one_line
from lowtide.cli.common.structured import structured_option

if TYPE_CHECKING:
    from lowtide.runtime.planning.plan import ResolvedModel


@click.command("plan", short_help="Show how much memory a model needs.")
@opening_options
@speculate_option
@quality_option
@prefix_cache_option
@structured_option
@click.option(
    "--expected-tokens",
    type=click.IntRange(min=0),
    default=0,
    metavar="TOKENS",
    help="Make room for a prompt and its answer of so many tokens before anything else.  [default: unknown]",
)
@click.option(
    "--sequences",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Make room for so many answers that are computed together, as `lowtide serve` does.",
)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Show how much memory each component of a model needs. Reads its headers and loads nothing.

    Exits with 2 if the model does not fit. MODEL is a .gguf file, an ONNX folder, a name from
    `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide.cli.common.output import json_object, kernel_values
    from lowtide.memory.units import OverBudget

    planned = planned_model(options)
    if as_json:
        values = {**planned.plan.to_dict(), **kernel_values(planned)}
        click.echo(json_object(planned, **values))
    else:
        _print_plan(planned)
    try:
        planned.require_fit()
    except OverBudget as error:
        click.echo(f"Error: {one_line(str(error))}", err=True)
        sys.exit(error.exit_code)


def _print_plan(planned: ResolvedModel) -> None:
    from lowtide.memory.units import format_bytes_up

    plan, spec = planned.plan, planned.spec
    click.echo(
        f"{spec.name}: {spec.architecture}, {spec.num_layers} layers, {spec.quantisation}, context of up to "
        f"{spec.context_length:,} tokens\n"
    )
    click.echo(str(plan))
    if plan.speculation is not None:
        click.echo(str(plan.speculation))
    kernels = planned.kernels
    click.echo(
        f"Kernels: attention by {kernels['attention']}, {planned.attention_in_words}; matmuls by {kernels['matmuls']}; "
        f"{kernels['library']}"
    )
    if planned.engine_kernels_reason is not None:
        click.echo(f"Not lowtide's alone, because {planned.engine_kernels_reason}")
    if planned.quality is not None:
        click.echo(f"Quality: {planned.quality.sentence}")
    click.echo(f"Smallest budget: {format_bytes_up(plan.lower_bound_bytes)}")
