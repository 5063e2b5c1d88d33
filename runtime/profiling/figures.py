"""The figures of a profile, drawn with matplotlib: memory over time, plan, phases, layers, retained tokens.

matplotlib is imported inside of the functions: only the drawing process (runtime/profiling/export.py) calls
them, because its memory must not be part of the measured process.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowtide.memory.plan.line import (
    CACHE,
    COMPUTE,
    FILTER_PREFILL,
    INTERPRETER,
    PREFIXES,
    PROMPT,
    SAMPLING,
    SCRATCH,
    VOCABULARY,
    WEIGHTS,
)
from lowtide.memory.units import MIB, format_bytes
from lowtide.runtime.profiling.memory import OTHER
from lowtide.runtime.profiling.report import LayerTime, ProfileReport
from lowtide.runtime.profiling.retention_map import RetentionMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SCORE, RETAINED = "#b3261e", "#2f6fab"


def draw_retention_map(figure: Figure, retention_map: RetentionMap) -> None:
    """Draw the score of each token over the prompt, and below it which tokens were retained."""
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
    edges = [i * retention_map.bin_tokens for i in range(len(retention_map.scores))]
    edges.append(retention_map.num_tokens)
    axes.stairs(retention_map.scores, edges, color=SCORE, fill=True, alpha=0.85)
    axes.set_ylabel("score")
    axes.set_ylim(bottom=min(0.0, *retention_map.scores))
    axes.set_title(
        f"Retained: {retention_map.num_retained:,} of {retention_map.num_tokens:,} tokens of the last prompt",
        loc="left",
    )
    strip.pcolormesh(
        edges, [0, 1], [retention_map.retained], cmap=_from_white(RETAINED), vmin=0, vmax=1
    )
    strip.set_yticks([0.5], ["retained"])
    strip.set_xlim(0, retention_map.num_tokens)
    strip.set_xlabel("position in the prompt, tokens")


def _from_white(colour: str) -> object:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("retained", ["#ffffff", colour])


COLOURS = {
    INTERPRETER: "#8c8c8c",
    VOCABULARY: "#b8860b",
    WEIGHTS: "#2f6fab",
    CACHE: "#d95f30",
    COMPUTE: "#4da167",
    SCRATCH: "#8e5ea8",
    SAMPLING: "#e0a4c0",
    PROMPT: "#6cc4d1",
    PREFIXES: "#f2b134",
    FILTER_PREFILL: "#f0906c",
    OTHER: "#d9d9d9",
}
PHASE_COLOURS = {
    "libraries": "#8c8c8c",
    "weights": "#2f6fab",
    "context": "#b8860b",
    "filter pass": "#f0906c",
    "prefill pass": "#4da167",
    "decode pass": "#d95f30",
}
PLANNED, MEASURED, ATTENTION = "#c9d6e3", "#2f6fab", "#8e5ea8"
LIMIT, TEXT = "#b3261e", "#222222"
FAR_LIMIT = 3.0
"""A limit above this multiple of the peak stands only in the legend: a line would flatten the rest."""
MIN_SHARE = 1 / 500
"""A component that never reaches this share of the peak is too thin to be visible."""
Draw = Callable[["Figure", ProfileReport], None]


def svg(report: ProfileReport, draw: Draw, width: float, height: float) -> str:
    """Return a figure as an `<svg>` element for a page; sizes in inches."""
    with _style(draw.__name__):
        figure = _figure(width, height)
        draw(figure, report)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def image(report: ProfileReport) -> bytes:
    """Return all figures as one PNG."""
    with _style("image"):
        drawn = _parts(report)
        figure = _figure(11, sum(height for _, height in drawn))
        parts = figure.subfigures(len(drawn), 1, height_ratios=[height for _, height in drawn])
        figure.suptitle(_title(report), parse_math=False, fontsize=13, fontweight="bold")
        for part, (draw, _) in zip(parts, drawn, strict=True):
            draw(part, report)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _parts(report: ProfileReport) -> list[tuple[Draw, float]]:
    """Return the figures that this report has, with their heights in inches."""
    parts: list[tuple[Draw, float]] = [
        (memory_over_time, 5.0),
        (planned_and_measured, 4.2),
        (phases, 3.2),
    ]
    parts += [(layers, 3.2)] if report.layers else []
    parts += [(retention_map, 3.2)] if report.retention_map is not None else []
    return parts


def _title(report: ProfileReport) -> str:
    peak, budget = format_bytes(report.peak_rss_bytes), format_bytes(report.plan.budget.num_bytes)
    return f"{report.model_name}: peak {peak} of {budget}, {report.seconds:.1f} s"


def memory_over_time(figure: Figure, report: ProfileReport) -> None:
    """Draw the resident set by component, with the budget, and the phases below."""
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[9, 1])
    samples = report.timeline.samples
    at = [(sample.at_ns - report.begin_ns) / 1e9 for sample in samples]
    top = max((sample.resident_bytes for sample in samples), default=0) or 1
    names = [name for name in COLOURS if _is_visible(report, name, top)]
    heights = [[max(s.components.get(name, 0), 0) / MIB for s in samples] for name in names]
    if at and names:
        colours = [COLOURS[name] for name in names]
        axes.stackplot(at, heights, labels=names, colors=colours, step="post", linewidth=0)
    _limit(axes, report.plan.budget.num_bytes, top, "budget", "-")
    _limit(axes, report.plan.total_bytes, top, "planned peak", "--")
    axes.set_ylabel("resident, MiB")
    axes.set_ylim(bottom=0)
    axes.set_title("Resident memory by component", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False
    )
    _phases_over_time(strip, report)


def _is_visible(report: ProfileReport, component: str, top: int) -> bool:
    most = max((s.components.get(component, 0) for s in report.timeline.samples), default=0)
    return most >= top * MIN_SHARE


def _limit(axes: Axes, num_bytes: int, top: int, name: str, line: str) -> None:
    """Draw a line if it is not far above the peak; put it into the legend in any case."""
    label = f"{name}, {format_bytes(num_bytes)}"
    if num_bytes <= FAR_LIMIT * top:
        axes.axhline(num_bytes / MIB, color=LIMIT, linestyle=line, linewidth=1.6, label=label)
    else:
        axes.plot([], [], color=LIMIT, linestyle=line, label=f"{label}\n(outside of the figure)")


def _phases_over_time(strip: Axes, report: ProfileReport) -> None:
    for name, colour in PHASE_COLOURS.items():
        bars = [
            ((span.begin_ns - report.begin_ns) / 1e9, (span.end_ns - span.begin_ns) / 1e9)
            for span in report.timeline.spans
            if span.name == name
        ]
        if bars:
            strip.broken_barh(bars, (0, 1), facecolors=colour, label=name)
    strip.set_yticks([])
    strip.set_xlabel("seconds")
    strip.set_xlim(0, max(report.seconds, 1e-3))
    strip.spines["left"].set_visible(False)
    strip.legend(loc="upper left", bbox_to_anchor=(1.01, 1.6), frameon=False, fontsize=8)


def planned_and_measured(figure: Figure, report: ProfileReport) -> None:
    """Draw the planned and the measured bytes of each component, in MiB."""
    axes = figure.subplots()
    planned = {row.component: row.num_bytes for row in report.plan.rows}
    rows = [row for row in report.measured if planned.get(row.component) or row.num_bytes]
    for at, row in enumerate(rows):
        if row.component in planned:
            _bar(axes, at - 0.2, planned[row.component] / MIB, PLANNED, "")
        value = None if row.num_bytes is None else row.num_bytes / MIB
        _bar(axes, at + 0.2, value, MEASURED, "not measured" if value is None else "")
    axes.set_yticks(range(len(rows)), [row.component for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.margins(x=0.25)
    axes.set_title("Planned and measured, in the largest sample", loc="left")
    _key(axes, (PLANNED, "planned"), (MEASURED, "measured"))


def _bar(axes: Axes, at: float, value: float | None, colour: str, label: str) -> None:
    axes.barh(at, value or 0.0, height=0.38, color=colour)
    text = label or f"{value or 0.0:,.1f}"
    axes.annotate(
        text, (max(value or 0.0, 0.0), at), xytext=(3, 0), textcoords="offset points",
        va="center", fontsize=7.5, color=TEXT,
    )  # fmt: skip


def phases(figure: Figure, report: ProfileReport) -> None:
    """Draw the seconds of each phase, the longest first."""
    axes = figure.subplots()
    ordered = sorted(report.phases, key=lambda phase: -phase.seconds)
    for at, phase in enumerate(ordered):
        axes.barh(at, phase.seconds, height=0.7, color=PHASE_COLOURS.get(phase.name, "#5b7f95"))
        share = phase.seconds / report.seconds if report.seconds else 0.0
        axes.annotate(
            f"{phase.seconds:.3f} s, {share:.1%}", (phase.seconds, at), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=7.5, color=TEXT,
        )  # fmt: skip
    axes.set_yticks(range(len(ordered)), [phase.name for phase in ordered])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("seconds")
    axes.set_title("Time by phase", loc="left")


def layers(figure: Figure, report: ProfileReport) -> None:
    """Draw the mean time of each layer in a prefill pass and in a decode pass."""
    left, right = figure.subplots(1, 2)
    prefill, decode = report.num_timed_passes
    _layer_bars(
        left, report, f"Prefill, by layer (mean of {prefill})",
        lambda layer: layer.prefill_pass_s, lambda layer: layer.prefill_attention_s,
    )  # fmt: skip
    _layer_bars(
        right, report, f"Decode, by layer (mean of {decode})",
        lambda layer: layer.decode_pass_s, lambda layer: layer.decode_attention_s,
    )  # fmt: skip


def retention_map(figure: Figure, report: ProfileReport) -> None:
    """Draw the retained tokens of the last filtered prompt."""
    if report.retention_map is not None:
        draw_retention_map(figure, report.retention_map)


def _layer_bars(
    axes: Axes,
    report: ProfileReport,
    title: str,
    whole: Callable[[LayerTime], float | None],
    attention: Callable[[LayerTime], float | None],
) -> None:
    at = range(len(report.layers))
    in_attention = [1000 * (attention(layer) or 0.0) for layer in report.layers]
    axes.bar(at, [1000 * (whole(layer) or 0.0) for layer in report.layers], color=MEASURED)
    if any(in_attention):
        axes.bar(at, in_attention, color=ATTENTION)
        axes.margins(y=0.2)  # room for the key above the bars
        _key(axes, (MEASURED, "layer"), (ATTENTION, "of which attention"))
    step = max(1, len(report.layers) // 8)
    ticks = [i for i in at if i % step == 0 and i < len(report.layers) - max(step // 2, 1)]
    ticks.append(len(report.layers) - 1)
    axes.set_xticks(ticks, [report.layers[i].name for i in ticks])
    axes.set_ylabel("ms/pass")
    axes.set_title(title, loc="left")


def _key(axes: Axes, *entries: tuple[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=label) for colour, label in entries]
    axes.legend(handles=patches, frameon=False, loc="upper right", fontsize=8, ncols=2)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Set the style, and silence matplotlib's messages about fonts and caches."""
    import matplotlib

    style: dict[str, Any] = {
        "svg.hashsalt": salt,  # identifiers must differ within a page and be the same in every run
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlesize": 10,
        "text.color": TEXT,
    }
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
