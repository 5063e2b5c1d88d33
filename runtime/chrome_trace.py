"""A profile in the trace event format, which Chrome's about:tracing and Perfetto open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowtide.runtime.profile_report import OUTPUT, ProfileReport
from lowtide.runtime.timeline import LayerPass

PROCESS = 1
RUN, LAYERS = 1, 2
"""Rows of the trace: what the runtime does, and the layers of the passes that were timed."""


def chrome_trace(report: ProfileReport) -> dict[str, Any]:
    """Return the trace as a JSON object: times in microseconds from the start, sizes in bytes."""
    return {
        "traceEvents": [*_names(report), *_spans(report), *_layers(report), *_counters(report)],
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
        yield _complete(report, RUN, span.name, span.begin_ns, span.end_ns, {"rows": span.num_rows})


def _layers(report: ProfileReport) -> Iterator[dict[str, Any]]:
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
        yield {**common, "name": "resident bytes", "args": sample.owners}
        yield {**common, "name": "tokens in cache", "args": {"tokens": sample.num_tokens}}


def _complete(
    report: ProfileReport, thread: int, name: str, begin_ns: int, end_ns: int, told: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X", "pid": PROCESS, "tid": thread, "name": name, "cat": "lowtide", "args": told,
        "ts": _us(report, begin_ns), "dur": max(end_ns - begin_ns, 0) / 1000,
    }  # fmt: skip


def _us(report: ProfileReport, at_ns: int) -> float:
    return (at_ns - report.begin_ns) / 1000
