"""A profile as one HTML page that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lowtide.memory.units import MIB, format_bytes
from lowtide.runtime import profile_figures as figures
from lowtide.runtime.profile_report import ProfileReport
from lowtide.runtime.prompt_heat import PromptHeat

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
    """Return the page: figures as SVG, and the numbers of the JSON in tables."""
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
    if report.heat is not None:
        parts += [
            "<h2>What was kept of the last prompt</h2>",
            figures.svg(report, figures.heat, 10, 3.2),
            _passages(report.heat),
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
    planned = {row.owner: row.num_bytes for row in report.plan.rows}
    rows = [
        (row.owner, _mib(planned.get(row.owner)), _mib(row.num_bytes), row.how)
        for row in report.measured
    ]
    total = ("in all", _mib(report.plan.total_bytes), _mib(report.resident_bytes), "highest sample")
    head = ("owner", "planned, MiB", "measured, MiB", "measured how")
    return _table(head, rows, total, numeric=(1, 2))


def _phases(report: ProfileReport) -> str:
    rows = [
        (phase.name, f"{phase.seconds:.6f}", f"{phase.calls:,}")
        for phase in sorted(report.phases, key=lambda phase: -phase.seconds)
    ]
    total = ("in all", f"{report.seconds:.6f}", "")
    return _table(("phase", "seconds", "calls"), rows, total, numeric=(1, 2))


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
    head = ("layer", "prefill, ms", "our attention", "decode, ms", "our attention")
    note = f"Means of a pass: {prefill} of prefill and {decode} of decode were timed."
    return f'<p class="note">{note}</p>' + _table(head, rows, (), numeric=(1, 2, 3, 4))


def _passages(heat: PromptHeat) -> str:
    rows = [
        (f"{passage.position:,}", f"{passage.tokens:,}", f"{passage.score:.4f}", passage.text)
        for passage in heat.passages
    ]
    total = ("in all", f"{heat.num_kept:,}", "", "")
    return _table(("position", "tokens", "highest score", "text"), rows, total, numeric=(0, 1, 2))


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
