"""A profile as a file: a trace (for Perfetto or chrome://tracing), a web page, or an image.

The page and the image are drawn by `draw` in a process of its own, so that matplotlib's memory is not part of
the process whose peak is bounded. The report goes there pickled over a pipe, which is safe, because both
ends are the same program.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, Literal, TypeAlias

from lowtide.memory.units import MIB, format_bytes
from lowtide.models.errors import LowtideError
from lowtide.runtime.profiling import figures
from lowtide.runtime.profiling.report import OUTPUT, ProfileReport
from lowtide.runtime.profiling.retention_map import RetentionMap
from lowtide.runtime.profiling.timeline import LayerPass

PROCESS = 1
RUN, LAYERS = 1, 2
"""Threads of the trace: the spans of the runtime, and the layers of timed passes."""


def chrome_trace(report: ProfileReport) -> dict[str, Any]:
    """Return the trace as a JSON object: times in microseconds from the start, sizes in bytes."""
    return {
        "traceEvents": [
            *_names(report),
            *_spans(report),
            *_layer_events(report),
            *_counters(report),
        ],
        "displayTimeUnit": "ms",
        "otherData": {
            "model": report.model_name,
            "budget_bytes": report.plan.budget.num_bytes,
            "peak_rss_bytes": report.peak_rss_bytes,
            "dropped_spans": report.timeline.num_dropped,
        },
    }


def _names(report: ProfileReport) -> Iterator[dict[str, Any]]:
    for kind, thread, name in (
        ("process_name", RUN, f"lowtide: {report.model_name}"),
        ("thread_name", RUN, "runtime"),
        ("thread_name", LAYERS, "layers"),
    ):
        yield {"ph": "M", "pid": PROCESS, "tid": thread, "name": kind, "args": {"name": name}}


def _spans(report: ProfileReport) -> Iterator[dict[str, Any]]:
    for span in report.timeline.spans:
        yield _complete(
            report, RUN, span.name, span.begin_ns, span.end_ns, {"tokens": span.num_rows}
        )


def _layer_events(report: ProfileReport) -> Iterator[dict[str, Any]]:
    for timed in report.timeline.passes:
        yield from _layers_of(report, timed)


def _layers_of(report: ProfileReport, timed: LayerPass) -> Iterator[dict[str, Any]]:
    begin = timed.begin_ns
    for layer, (end, attention) in enumerate(zip(timed.ends_ns, timed.attention_ns, strict=True)):
        if end:
            yield _complete(
                report, LAYERS, f"layer {layer}", begin, timed.begin_ns + end,
                {"attention_us": attention / 1000} if attention else {},
            )  # fmt: skip
            begin = timed.begin_ns + end
    yield _complete(report, LAYERS, OUTPUT, begin, timed.end_ns, {})


def _counters(report: ProfileReport) -> Iterator[dict[str, Any]]:
    for sample in report.timeline.samples:
        common = {"ph": "C", "pid": PROCESS, "tid": RUN, "ts": _us(report, sample.at_ns)}
        yield {**common, "name": "resident bytes", "args": sample.components}
        yield {**common, "name": "tokens in cache", "args": {"tokens": sample.num_tokens}}


def _complete(
    report: ProfileReport, thread: int, name: str, begin_ns: int, end_ns: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X", "pid": PROCESS, "tid": thread, "name": name, "cat": "lowtide", "args": args,
        "ts": _us(report, begin_ns), "dur": max(end_ns - begin_ns, 0) / 1000,
    }  # fmt: skip


def _us(report: ProfileReport, at_ns: int) -> float:
    return (at_ns - report.begin_ns) / 1000


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }
th.n, td.n { text-align: right; } tfoot td { font-weight: bold; border-bottom: 0; }
p.note { color: #555; }
"""


def profile_page(report: ProfileReport) -> str:
    """Return the page: figures as SVG, and the numbers of the JSON as tables. It refers to no other file."""
    parts = [
        f"<h1>{escape(report.model_name)}</h1>",
        f"<p>{escape(_summary(report))}</p>",
        figures.svg(report, figures.memory_over_time, 10, 4.6),
        "<h2>Planned and measured</h2>",
        figures.svg(report, figures.planned_and_measured, 10, 4.4),
        _memory(report),
        "<h2>Time by phase</h2>",
        figures.svg(report, figures.phases, 10, 3.4),
        _phases(report),
    ]
    if report.layers:
        parts += [
            "<h2>Time by layer</h2>",
            figures.svg(report, figures.layers, 10, 3.2),
            _layers(report),
        ]
    if report.retention_map is not None:
        parts += [
            "<h2>Retained tokens of the last prompt</h2>",
            figures.svg(report, figures.retention_map, 10, 3.2),
            _spans_table(report.retention_map),
        ]
    title = escape(f"lowtide profile: {report.model_name}")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary(report: ProfileReport) -> str:
    plan = report.plan
    return (
        f"Peak resident set {format_bytes(report.peak_rss_bytes)}, planned "
        f"{format_bytes(plan.total_bytes)}, budget {format_bytes(plan.budget.num_bytes)} "
        f"({plan.budget.source}). Context {plan.context:,} tokens of {plan.kv_type}. "
        f"{report.seconds:.2f} seconds."
    )


def _memory(report: ProfileReport) -> str:
    planned = {row.component: row.num_bytes for row in report.plan.rows}
    rows = [
        (row.component, _mib(planned.get(row.component)), _mib(row.num_bytes), row.how)
        for row in report.measured
    ]
    total = ("total", _mib(report.plan.total_bytes), _mib(report.resident_bytes), "largest sample")
    head = ("Component", "Planned, MiB", "Measured, MiB", "How")
    return _table(head, rows, total, numeric=(1, 2))


def _phases(report: ProfileReport) -> str:
    rows = [
        (phase.name, f"{phase.seconds:.6f}", f"{phase.calls:,}")
        for phase in sorted(report.phases, key=lambda phase: -phase.seconds)
    ]
    total = ("total", f"{report.seconds:.6f}", "")
    return _table(("Phase", "Seconds", "Calls"), rows, total, numeric=(1, 2))


def _layers(report: ProfileReport) -> str:
    prefill, decode = report.num_timed_passes
    rows = [
        (
            layer.name,
            _ms(layer.prefill_pass_s),
            _ms(layer.prefill_attention_s),
            _ms(layer.decode_pass_s),
            _ms(layer.decode_attention_s),
        )
        for layer in report.layers
    ]
    head = ("Layer", "Prefill, ms", "attention", "Decode, ms", "attention")
    note = f"Mean per pass, of {prefill} prefill passes and {decode} decode passes. Attention: lowtide's kernels."
    return f'<p class="note">{note}</p>' + _table(head, rows, (), numeric=(1, 2, 3, 4))


def _spans_table(retention_map: RetentionMap) -> str:
    rows = [
        (f"{span.position:,}", f"{span.tokens:,}", f"{span.score:.4f}", span.text)
        for span in retention_map.spans
    ]
    total = ("total", f"{retention_map.num_retained:,}", "", "")
    return _table(("Position", "Tokens", "Highest score", "Text"), rows, total, numeric=(0, 1, 2))


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str], numeric: Sequence[int]
) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        parts = [
            f"<{tag}{' class=n' if at in numeric else ''}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    foot = f"<tfoot>{line(total, 'td')}</tfoot>" if total else ""
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:,.2f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4f}"


Form: TypeAlias = Literal["page", "image"]
DRAWER_CODE = (
    "import sys; sys.path = [folder for folder in sys.path if folder]; "  # never import from the user's folder
    "from lowtide.runtime.profiling.export import serve; serve()"
)


def draw(report: ProfileReport, form: Form) -> bytes:
    """Return the page as HTML in UTF-8, or the image as PNG.

    Raises `LowtideError` with the reason if the process fails.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", DRAWER_CODE],
            input=pickle.dumps((report, form)),
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise _failed(form, error.strerror or str(error)) from None
    if done.returncode:
        messages = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
        raise _failed(form, _signal_name(done.returncode) or messages[-1])
    return done.stdout


def _failed(form: Form, reason: str) -> LowtideError:
    return LowtideError(
        f"cannot draw the {form} of the profile ({reason}): leave it out, --json has the same numbers"
    )


def _signal_name(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""


def serve() -> None:
    """Run the drawing process: read a report from standard input, write the file to standard output."""
    report, form = pickle.load(sys.stdin.buffer)
    data = profile_page(report).encode() if form == "page" else figures.image(report)
    sys.stdout.buffer.write(data)
