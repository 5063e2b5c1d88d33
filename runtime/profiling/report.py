"""ProfileReport: where the bytes and the milliseconds of a run went, as a value. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.process import read_process_memory
from lowtide.runtime.profiling.memory import OTHER
from lowtide.runtime.profiling.retention_map import RetentionMap
from lowtide.runtime.profiling.timeline import LayerPass, MemorySample, Timeline

if TYPE_CHECKING:
    from lowtide.runtime.planning.plan import ResolvedModel
    from lowtide.runtime.profiling.profiler import Profiler

OUTSIDE = "outside"
OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """An owner's bytes at the run's highest moment, and how they were found; None is "cannot be told"."""

    component: str
    num_bytes: int | None
    how: str


@dataclass(frozen=True, slots=True)
class Phase:
    """What a kind of span took in all, without what lay inside it: phases sum up to the run."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Mean seconds of a layer in a pass, and of our attention in it; None where none was timed.

    `name` is a layer's number, or "output": the last norm, the output matrix and its logits.
    """

    name: str
    prefill_pass_s: float | None
    decode_pass_s: float | None
    prefill_attention_s: float | None
    decode_attention_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """The plan, the same rows as measured, and the times.

    `measured` has the plan's rows and "other": their sum is `resident_bytes`, the highest sampled resident
    set. `peak_rss_bytes` is what the system saw, between samples too. `seconds` is the whole run.
    `begin_ns` is where the timeline starts.
    """

    model_name: str
    plan: MemoryPlan
    measured: tuple[MeasuredRow, ...]
    resident_bytes: int
    peak_rss_bytes: int
    seconds: float
    phases: tuple[Phase, ...]
    layers: tuple[LayerTime, ...]
    num_timed_passes: tuple[int, int]
    """Of prefill and of decode."""
    timeline: Timeline
    begin_ns: int
    retention_map: RetentionMap | None = None
    """What was kept of the last prompt that was filtered; None where none was."""

    @classmethod
    def of(
        cls, planned: ResolvedModel, profiler: Profiler, how: Callable[[str], str]
    ) -> ProfileReport:
        """Add up what a profiler has kept."""
        timeline = profiler.timeline
        # Before the model is loaded nobody's bytes are told apart.
        told = [sample for sample in timeline.samples if len(sample.components) > 1]
        highest = max(
            told or timeline.samples, key=lambda sample: sample.resident_bytes, default=None
        )
        resident = highest.resident_bytes if highest else 0
        seconds = (profiler.end_ns - profiler.begin_ns) / 1e9
        passes = {
            kind: [timed for timed in timeline.passes if timed.name == kind]
            for kind in ("prefill pass", "decode pass")
        }
        return cls(
            model_name=planned.spec.name,
            plan=planned.plan,
            measured=_measured(planned.plan, highest, how),
            resident_bytes=resident,
            # Linux rounds the counter that samples read by some pages for each thread.
            peak_rss_bytes=max(read_process_memory().peak_bytes, resident),
            seconds=seconds,
            phases=_phases(profiler.phases, seconds),
            layers=_layers(*passes.values()),
            num_timed_passes=(len(passes["prefill pass"]), len(passes["decode pass"])),
            timeline=timeline,
            begin_ns=profiler.begin_ns,
            retention_map=profiler.retention_map,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON: sizes in bytes, times in seconds."""
        return {
            "plan": self.plan.to_dict(),
            "measured": [
                {"component": row.component, "bytes": row.num_bytes, "how": row.how}
                for row in self.measured
            ],
            "resident_bytes": self.resident_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
            "phases": [asdict(phase) for phase in self.phases],
            "layers": [asdict(layer) for layer in self.layers],
            "retention_map": None if self.retention_map is None else self.retention_map.to_dict(),
        }


def _measured(
    plan: MemoryPlan, highest: MemorySample | None, how: Callable[[str], str]
) -> tuple[MeasuredRow, ...]:
    components = [row.component for row in plan.rows] + [OTHER]
    held = dict(highest.components) if highest else {}
    # A plan may have rows that nobody knows how to measure, and lack some that are measured.
    held[OTHER] = held.get(OTHER, 0) + sum(
        held.pop(name) for name in list(held) if name not in components
    )
    return tuple(
        MeasuredRow(component, held.get(component), how(component)) for component in components
    )


def _phases(spans: list[tuple[str, int, int]], seconds: float) -> tuple[Phase, ...]:
    phases = [Phase(name, nanoseconds / 1e9, calls) for name, nanoseconds, calls in spans]
    rest = seconds - sum(phase.seconds for phase in phases)
    return (*phases, Phase(OUTSIDE, max(rest, 0.0), 1))


def _layers(prefill: list[LayerPass], decode: list[LayerPass]) -> tuple[LayerTime, ...]:
    passes = prefill or decode
    if not passes:
        return ()
    num_layers = len(passes[0].ends_ns)
    names = [*map(str, range(num_layers)), OUTPUT]
    return tuple(
        LayerTime(
            name=name,
            prefill_pass_s=_mean([layer_seconds(timed)[at] for timed in prefill]),
            decode_pass_s=_mean([layer_seconds(timed)[at] for timed in decode]),
            prefill_attention_s=_attention(prefill, at),
            decode_attention_s=_attention(decode, at),
        )
        for at, name in enumerate(names)
    )


def layer_seconds(timed: LayerPass) -> list[float]:
    """Return the seconds of each layer of a pass, and last of what follows the layers."""
    ends = [*accumulate((0, *timed.ends_ns), max), timed.end_ns - timed.begin_ns]
    return [max(end - begin, 0) / 1e9 for begin, end in pairwise(ends)]


def _attention(passes: list[LayerPass], layer: int) -> float | None:
    ours = [
        timed.attention_ns[layer] / 1e9
        for timed in passes
        if layer < len(timed.attention_ns) and timed.attention_ns[layer]
    ]
    return _mean(ours)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
