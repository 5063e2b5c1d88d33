"""`lowtide profile`: runs a prompt or a script of turns, and shows where bytes and time went.

A profile as tables for the terminal."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.options import (
    generation_options,
    opening_options,
    plan_with,
    speculate_option,
    take_generation_options,
    take_open_options,
    take_spec,
)
from lowtide.cli.output import gpu_line
from lowtide.memory.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from lowtide import Runtime
    from lowtide.runtime.generation.statistics import Statistics
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.profiling.report import ProfileReport


MAX_SCRIPT_BYTES = 1 << 20
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("profile")
@opening_options
@speculate_option
@click.option("-p", "--prompt", help="The prompt.  [default: standard input]")
@click.option("--script", type=_FILE, help="A chat instead: a file with a turn in each line.")
@click.option("--report", type=_FILE, help="Write a page for the browser, which needs no network.")
@click.option("--trace", type=_FILE, help="Write a trace for Perfetto or chrome://tracing.")
@click.option("--png", type=_FILE, help="Write the figures as one picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@generation_options
def command(
    prompt: str | None,
    script: Path | None,
    report: Path | None,
    trace: Path | None,
    png: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a prompt or a script of turns and show where bytes and milliseconds went.

    Memory is told apart by the plan's owners, time by phase and by layer. --report and --png draw with
    matplotlib (pip install 'lowtide[report]'), after the run and in a process of its own beside --memory.
    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide import Profiler, Runtime
    from lowtide.cli.output import json_object, note, plan_line
    from lowtide.memory.plan.estimates import prompt_limit_bytes

    _check_outputs(report, trace, png)
    generation = take_generation_options(options)
    profiler = Profiler()
    with profiler.span("plan"):
        spec = take_spec(options)
        planned = plan_with(spec, replace(take_open_options(options), profiled=True))
    planned.require_fit()
    turns = _turns(prompt, script, prompt_limit_bytes(planned.plan.kv_tokens))
    note(plan_line(planned))
    with Runtime.load(planned, profiler=profiler) as runtime:
        answers = _run(runtime, turns, generation)
    found = profiler.report()
    if as_json:
        told = {**found.to_dict(), "turns": [stats.to_dict() for stats in answers]}
        click.echo(json_object(planned, **told))
    else:
        print_profile(found)
    _write(found, report, trace, png)


def _check_outputs(report: Path | None, trace: Path | None, png: Path | None) -> None:
    """Before anything is loaded: what would fail after a long run fails now."""
    from lowtide.models.errors import BadOption

    drawn = "--report" if report else "--png"
    if (report or png) and importlib.util.find_spec("matplotlib") is None:
        raise BadOption(
            f"{drawn} draws with matplotlib, which is not installed: pip install 'lowtide[report]', "
            f"or leave {drawn} out"
        )
    for path in filter(None, (report, trace, png)):
        if not path.absolute().parent.is_dir():
            raise BadOption(f"{path} cannot be written, there is no folder {path.parent}: make it")


def _turns(prompt: str | None, script: Path | None, limit_bytes: int) -> list[str]:
    from lowtide.cli.input import prompt_text, read_file
    from lowtide.models.errors import BadOption

    if script is None:
        return [prompt_text(prompt, None, limit_bytes)]
    if prompt is not None:
        raise click.UsageError("both --prompt and --script are given: give one")
    text = read_file(script, MAX_SCRIPT_BYTES)
    if len(text.encode()) > MAX_SCRIPT_BYTES:
        raise BadOption(f"{script} is longer than {MAX_SCRIPT_BYTES:,} bytes: give fewer turns")
    turns = [line for line in text.splitlines() if line.strip()]
    if not turns:
        raise BadOption(f"{script} has no turn: write one in each line")
    return turns


def _run(runtime: Runtime, turns: list[str], options: SamplingParams) -> list[Statistics]:
    """Answer the turns as a chat does, and tell each answer's cost."""
    from lowtide import GenerationResult
    from lowtide.cli.output import note, statistics_line

    messages: list[dict[str, str]] = []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        result = GenerationResult.of(runtime.chat(messages, options))
        messages.append({"role": "assistant", "content": result.text})
        answers.append(result.stats)
        note(statistics_line(result.stats, result.finish_reason))
    return answers


def _write(found: ProfileReport, report: Path | None, trace: Path | None, png: Path | None) -> None:
    """Write what was asked for; the numbers are told by then, whatever fails here."""
    from lowtide.models.errors import LowtideError

    try:
        if trace is not None:
            from lowtide.runtime.profiling.export import chrome_trace

            trace.write_text(json.dumps(chrome_trace(found)), encoding="utf-8")
        if report is not None:
            from lowtide.runtime.profiling.export import drawn

            report.write_bytes(drawn(found, "page"))
        if png is not None:
            from lowtide.runtime.profiling.export import drawn

            png.write_bytes(drawn(found, "picture"))
    except OSError as error:
        raise LowtideError(
            f"{error.filename} cannot be written: {error.strerror or error}"
        ) from None


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
    planned = {row.component: row.num_bytes for row in report.plan.rows}
    table = _table()
    table.add_column("component", footer="in all", no_wrap=True)
    table.add_column(
        "planned", justify="right", no_wrap=True, footer=format_bytes(report.plan.total_bytes)
    )
    table.add_column(
        "measured", justify="right", no_wrap=True, footer=format_bytes(report.resident_bytes)
    )
    table.add_column("how", footer="the highest resident set that was sampled")
    for row in report.measured:
        plan = format_bytes(planned[row.component]) if row.component in planned else ""
        measured = "-" if row.num_bytes is None else format_bytes(row.num_bytes)
        table.add_row(row.component, plan, measured, row.how)
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
