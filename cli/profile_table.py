"""A profile as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.cli.summary import gpu_line
from lowtide.memory.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from lowtide.runtime.profile_report import ProfileReport

MOST_LAYERS = 8
"""More layers than these are shown as the slowest ones."""


def print_profile(report: ProfileReport) -> None:
    """Print memory by owner, time by phase, and the layers that take the most."""
    from rich.console import Console

    console = Console()
    console.print(_memory(report))
    for gpu in report.plan.gpus:
        console.print(f"{gpu_line(gpu)}; not measured", highlight=False)
    console.print(_phases(report))
    if report.layers:
        console.print(_layers(report))
    console.print(
        f"peak {format_bytes(report.peak_rss_bytes)} of {format_bytes(report.plan.budget.num_bytes)}"
        f" · {report.seconds:.2f} s",
        highlight=False,
    )


def _memory(report: ProfileReport) -> Table:
    planned = {row.owner: row.num_bytes for row in report.plan.rows}
    table = _table()
    table.add_column("owner", footer="in all", no_wrap=True)
    table.add_column(
        "planned", justify="right", no_wrap=True, footer=format_bytes(report.plan.total_bytes)
    )
    table.add_column(
        "measured", justify="right", no_wrap=True, footer=format_bytes(report.resident_bytes)
    )
    table.add_column("how", footer="the highest resident set that was sampled")
    for row in report.measured:
        plan = format_bytes(planned[row.owner]) if row.owner in planned else ""
        measured = "-" if row.num_bytes is None else format_bytes(row.num_bytes)
        table.add_row(row.owner, plan, measured, row.how)
    return table


def _phases(report: ProfileReport) -> Table:
    table = _table()
    table.add_column("phase", footer="in all", no_wrap=True)
    table.add_column("seconds", justify="right", footer=f"{report.seconds:.3f}")
    table.add_column("share", justify="right")
    table.add_column("calls", justify="right")
    table.add_column("ms a call", justify="right")
    for phase in sorted(report.phases, key=lambda some: -some.seconds):
        share = phase.seconds / report.seconds if report.seconds else 0.0
        each = 1000 * phase.seconds / phase.calls
        table.add_row(
            phase.name, f"{phase.seconds:.3f}", f"{share:.1%}", f"{phase.calls:,}", f"{each:.3f}"
        )
    return table


def _layers(report: ProfileReport) -> Table:
    slowest = sorted(
        report.layers,
        key=lambda layer: -((layer.decode_pass_s or 0.0) + (layer.prefill_pass_s or 0.0)),
    )[:MOST_LAYERS]
    prefill, decode = report.num_timed_passes
    table = _table()
    table.add_column("layer" if len(report.layers) <= MOST_LAYERS else "slowest layers")
    table.add_column("ms a prefill pass", justify="right", footer=f"{prefill} timed")
    table.add_column("our attention", justify="right")
    table.add_column("ms a decode pass", justify="right", footer=f"{decode} timed")
    table.add_column("our attention", justify="right")
    for layer in slowest:
        table.add_row(
            layer.name,
            *map(
                _milliseconds,
                (
                    layer.prefill_pass_s,
                    layer.prefill_attention_s,
                    layer.decode_pass_s,
                    layer.decode_attention_s,
                ),
            ),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3f}"


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
