"""`lowtide profile`: runs a prompt or several chat turns, and shows memory by component and time by phase."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.options import (
    generation_options,
    json_option,
    opening_options,
    plan_with,
    quality_option,
    speculate_option,
    take_generation_options,
    take_open_options,
    take_spec,
    take_template_arguments,
    template_options,
)
from lowtide.cli.common.output import gpu_line
from lowtide.memory.units import format_bytes
from lowtide.models.gguf.buffers import bytes_on

if TYPE_CHECKING:
    from rich.table import Table

    from lowtide import Runtime
    from lowtide.memory.plan.gpu import GpuPlan
    from lowtide.runtime.generation.statistics import Statistics
    from lowtide.runtime.options import SamplingParams
    from lowtide.runtime.planning.expected import PromptLimit
    from lowtide.runtime.profiling.report import ProfileReport


MAX_SCRIPT_BYTES = 1 << 20
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("profile", short_help="Show where memory and time go.")
@opening_options
@speculate_option
@quality_option
@template_options
@click.option("-p", "--prompt", help="The prompt.  [default: read from standard input]")
@click.option("--script", type=_FILE, help="Run a chat instead: a file with one turn per line.")
@click.option("--report", type=_FILE, help="Write a web page with figures; it works offline.")
@click.option("--trace", type=_FILE, help="Write a trace for Perfetto or chrome://tracing.")
@click.option("--png", type=_FILE, help="Write the figures as one image.")
@json_option
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
    """Run a prompt or several chat turns, and show where memory and time went.

    Memory is shown by the plan's components, time by phase and by layer. --report and --png need
    matplotlib (pip install 'lowtide[report]'), which runs afterwards in a process of its own, outside of
    --memory. MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide import Profiler
    from lowtide.cli.common.output import json_object, note, plan_line, template_note
    from lowtide.cli.common.progress import load_runtime
    from lowtide.runtime.planning.expected import ExpectedPrompt, PromptLimit

    _check_outputs(report, trace, png)
    generation = take_generation_options(options)
    arguments = take_template_arguments(options)
    profiler = Profiler()
    spec = take_spec(options)
    config = replace(take_open_options(options), profiled=True)
    turns = _turns(prompt, script, PromptLimit.of(spec, config))
    messages = [{"role": "user", "content": turn} for turn in turns]
    with profiler.span("plan"):
        planned = plan_with(
            spec, config, ExpectedPrompt(messages=messages, params=generation, arguments=arguments)
        )
    planned.require_fit()
    note(plan_line(planned))
    with load_runtime(planned, profiler) as runtime:
        template_note(runtime)
        answers = _run(runtime, turns, generation, arguments)
    found = profiler.report()
    if as_json:
        turn_values = [stats.to_dict() for stats in answers]
        click.echo(json_object(planned, **found.to_dict(), turns=turn_values))
    else:
        print_profile(found)
    _write(found, report, trace, png)


def _check_outputs(report: Path | None, trace: Path | None, png: Path | None) -> None:
    """Raise `BadOption` now, before a long run, if an output could not be written after it."""
    from lowtide.models.errors import BadOption

    option = "--report" if report else "--png"
    if (report or png) and importlib.util.find_spec("matplotlib") is None:
        raise BadOption(
            f"{option} needs matplotlib, which is not installed: run pip install 'lowtide[report]', or leave "
            f"{option} out"
        )
    for path in filter(None, (report, trace, png)):
        if not path.absolute().parent.is_dir():
            raise BadOption(
                f"cannot write {path}, because the folder {path.parent} does not exist: create it"
            )


def _turns(prompt: str | None, script: Path | None, limit: PromptLimit) -> list[str]:
    from lowtide.cli.common.input import prompt_text, read_file
    from lowtide.models.errors import BadOption

    if script is None:
        return [prompt_text(prompt, None, limit)]
    if prompt is not None:
        raise click.UsageError("--prompt and --script exclude each other: use one")
    text = read_file(script, MAX_SCRIPT_BYTES)
    if len(text.encode()) > MAX_SCRIPT_BYTES:
        raise BadOption(f"{script} is longer than {MAX_SCRIPT_BYTES:,} bytes: use fewer turns")
    turns = [line for line in text.splitlines() if line.strip()]
    if not turns:
        raise BadOption(f"{script} has no turns: write one per line")
    return turns


def _run(
    runtime: Runtime, turns: list[str], options: SamplingParams, arguments: dict[str, Any]
) -> list[Statistics]:
    """Answer the turns as a chat, and print the statistics of each answer."""
    from lowtide import GenerationResult
    from lowtide.cli.common.output import note, statistics_line

    messages: list[dict[str, str]] = []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        chunks = runtime.chat(messages, options, template_arguments=arguments)
        result = GenerationResult.of(chunks)
        messages.append({"role": "assistant", "content": result.text})
        answers.append(result.stats)
        note(statistics_line(result.stats, result.finish_reason))
    return answers


def _write(found: ProfileReport, report: Path | None, trace: Path | None, png: Path | None) -> None:
    """Write the requested files; the numbers are printed before, whatever fails here."""
    from lowtide.models.errors import LowtideError

    try:
        if trace is not None:
            from lowtide.runtime.profiling.export import chrome_trace

            trace.write_text(json.dumps(chrome_trace(found)), encoding="utf-8")
        if report is not None:
            from lowtide.runtime.profiling.export import draw

            report.write_bytes(draw(found, "page"))
        if png is not None:
            from lowtide.runtime.profiling.export import draw

            png.write_bytes(draw(found, "image"))
    except OSError as error:
        raise LowtideError(f"cannot write {error.filename}: {error.strerror or error}") from None


MAX_LAYERS = 8
"""Of a model with more layers, only the slowest are shown."""


def print_profile(report: ProfileReport) -> None:
    """Print memory by component, time by phase, and the slowest layers."""
    from rich.console import Console

    console = Console()
    console.print(_memory(report))
    for gpu in report.plan.gpus:
        console.print(f"{gpu_line(gpu)}: {_buffers(report, gpu)}", highlight=False)
    console.print(_phases(report))
    if report.layers:
        console.print(_layers(report))
    console.print(
        f"peak {format_bytes(report.peak_rss_bytes)} of {format_bytes(report.plan.budget.num_bytes)}"
        f" · {report.seconds:.2f} s",
        highlight=False,
    )


def _buffers(report: ProfileReport, gpu: GpuPlan) -> str:
    """Return what llama.cpp allocated on a GPU, by component, and what was planned."""
    found = bytes_on(report.buffers, gpu.device.name)
    return ", ".join(
        f"{row.component} {format_bytes(found[row.component])} of {format_bytes(row.num_bytes)}"
        for row in gpu.rows
        if row.component in found
    )


def _memory(report: ProfileReport) -> Table:
    planned = {row.component: row.num_bytes for row in report.plan.rows}
    table = _table()
    table.add_column("Component", footer="total", no_wrap=True)
    table.add_column(
        "Planned", justify="right", no_wrap=True, footer=format_bytes(report.plan.total_bytes)
    )
    table.add_column(
        "Measured", justify="right", no_wrap=True, footer=format_bytes(report.resident_bytes)
    )
    table.add_column("How", footer="largest sampled resident set")
    for row in report.measured:
        plan = format_bytes(planned[row.component]) if row.component in planned else ""
        measured = "-" if row.num_bytes is None else format_bytes(row.num_bytes)
        table.add_row(row.component, plan, measured, row.how)
    return table


def _phases(report: ProfileReport) -> Table:
    table = _table()
    table.add_column("Phase", footer="total", no_wrap=True)
    table.add_column("Seconds", justify="right", footer=f"{report.seconds:.3f}")
    table.add_column("Share", justify="right")
    table.add_column("Calls", justify="right")
    table.add_column("ms/call", justify="right")
    for phase in sorted(report.phases, key=lambda phase: -phase.seconds):
        share = phase.seconds / report.seconds if report.seconds else 0.0
        call_ms = 1000 * phase.seconds / phase.calls
        table.add_row(
            phase.name, f"{phase.seconds:.3f}", f"{share:.1%}", f"{phase.calls:,}", f"{call_ms:.3f}"
        )
    return table


def _layers(report: ProfileReport) -> Table:
    slowest = sorted(
        report.layers,
        key=lambda layer: -((layer.decode_pass_s or 0.0) + (layer.prefill_pass_s or 0.0)),
    )[:MAX_LAYERS]
    prefill, decode = report.num_timed_passes
    table = _table()
    table.add_column("Layer" if len(report.layers) <= MAX_LAYERS else "Slowest layers")
    table.add_column("ms/prefill pass", justify="right", footer=f"{prefill} timed")
    table.add_column("attention", justify="right")
    table.add_column("ms/decode pass", justify="right", footer=f"{decode} timed")
    table.add_column("attention", justify="right")
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
