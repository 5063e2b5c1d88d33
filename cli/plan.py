"""`lowtide plan`: what a model would take, from its headers alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.options import (
    opening_options,
    planned_model,
    prefix_cache_option,
    speculate_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from lowtide.memory.plan.line import PlanLine
    from lowtide.runtime.planning.plan import ResolvedModel


@click.command("plan")
@opening_options
@speculate_option
@prefix_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **options: Any) -> None:
    """Show where every byte would go; reads the model's headers and loads nothing.

    Exits with 2 where the model does not fit. MODEL is a .gguf file, an ONNX folder, a name from
    `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide.cli.output import json_object
    from lowtide.memory.units import OverBudget

    planned = planned_model(options)
    if as_json:
        click.echo(json_object(planned, **planned.plan.to_dict()))
    else:
        _print_table(planned)
    try:
        planned.require_fit()
    except OverBudget as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


def _print_table(planned: ResolvedModel) -> None:
    from rich.console import Console

    from lowtide.memory.units import format_bytes_up

    plan, spec = planned.plan, planned.spec
    console = Console()
    console.print(
        f"{spec.name}: {spec.architecture}, {spec.num_layers} layers, {spec.quantisation}, "
        f"{spec.context_length:,} tokens at most",
        highlight=False,
    )
    budget = plan.budget
    console.print(
        _rows_table(
            plan.rows, plan.total_bytes, budget.num_bytes, "planned peak", f": {budget.source}"
        )
    )
    for gpu in plan.gpus:
        console.print(f"{gpu.device.name}: {gpu.device.description}", highlight=False)
        console.print(
            _rows_table(gpu.rows, gpu.total_bytes, gpu.budget_bytes, f"on {gpu.device.name}")
        )
    for step in plan.downgrades:
        console.print(f"gave up {step}", highlight=False)
    console.print(
        f"lower bound {format_bytes_up(plan.lower_bound_bytes)}: the least budget it runs in",
        highlight=False,
    )


def _rows_table(
    rows: Sequence[PlanLine], total_bytes: int, budget_bytes: int, total: str, source: str = ""
) -> Table:
    """Return the rows of the process or of a device, with their sum against the limit."""
    from rich import box
    from rich.table import Table

    from lowtide.memory.units import format_bytes

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("component", footer=total, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True, footer=format_bytes(total_bytes))
    table.add_column("", no_wrap=True, footer=_bar(total_bytes, budget_bytes))
    table.add_column("why", footer=f"of {format_bytes(budget_bytes)}{source}")
    for row in rows:
        bar = _bar(row.num_bytes, budget_bytes)
        table.add_row(row.component, format_bytes(row.num_bytes), bar, row.why)
    return table


def _bar(num_bytes: int, budget_bytes: int, width: int = 12) -> str:
    """Return a bar of the row's share of the budget."""
    eighths = min(round(8 * width * num_bytes / max(budget_bytes, 1)), 8 * width)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip())
