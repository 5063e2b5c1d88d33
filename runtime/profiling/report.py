"""ProfileReport: memory by component and time by phase and layer of a run, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any, Protocol

from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.process import read_process_memory
from lowtide.models.gguf.buffers import Buffer
from lowtide.models.spec import ModelSpec
from lowtide.runtime.profiling.memory import OTHER
from lowtide.runtime.profiling.retention_map import RetentionMap
from lowtide.runtime.profiling.timeline import LayerPass, MemorySample, Timeline

OUTSIDE = "outside"
OUTPUT = "output"


class ProfilerRecords(Protocol):
    """What a report reads of a profiler: its records, and when they begin and end, in nanoseconds."""

    timeline: Timeline
    retention_map: RetentionMap | None
    buffers: tuple[Buffer, ...]
    begin_ns: int
    end_ns: int

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, nanoseconds without nested spans, and number of each kind of span."""
        ...


@dataclass(frozen=True, slots=True)
class MeasuredLine:
    """A component's bytes in the largest sample, and how they were measured; None means not measured."""

    component: str
    num_bytes: int | None
    how: str


@dataclass(frozen=True, slots=True)
class Phase:
    """Total seconds of a kind of span without the spans inside it; all phases sum up to the run."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Mean seconds of a layer per pass, and of lowtide's attention in it; None if no pass was timed.

    `name` is the layer's number, or "output" for the last norm, the output matrix and the logits.
    """

    name: str
    prefill_pass_s: float | None
    decode_pass_s: float | None
    prefill_attention_s: float | None
    decode_attention_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """The plan, the measured bytes of its components, and the times.

    `measured` has the plan's components and "other"; their sum is `resident_bytes`, the largest sampled
    resident set. `peak_rss_bytes` is the peak that the system reports, which includes the time between
    samples. `seconds` is the duration of the run, `begin_ns` the start of the timeline.
    """

    model_name: str
    plan: MemoryPlan
    measured: tuple[MeasuredLine, ...]
    resident_bytes: int
    peak_rss_bytes: int
    seconds: float
    phases: tuple[Phase, ...]
    layers: tuple[LayerTime, ...]
    num_timed_passes: tuple[int, int]
    """The number of timed prefill passes and of timed decode passes."""
    timeline: Timeline
    begin_ns: int
    retention_map: RetentionMap | None = None
    """The retained tokens of the last filtered prompt; None if no prompt was filtered."""
    buffers: tuple[Buffer, ...] = ()
    """llama.cpp's buffers on devices and in main memory, as it reports them."""

    @classmethod
    def of(
        cls, spec: ModelSpec, plan: MemoryPlan, profiler: ProfilerRecords, how: Callable[[str], str]
    ) -> ProfileReport:
        """Sum up the records of a profiler."""
        timeline = profiler.timeline
        # Before the model is loaded, samples have only a total.
        divided = [sample for sample in timeline.samples if len(sample.components) > 1]
        highest = max(
            divided or timeline.samples, key=lambda sample: sample.resident_bytes, default=None
        )
        resident = highest.resident_bytes if highest else 0
        seconds = (profiler.end_ns - profiler.begin_ns) / 1e9
        passes = {
            kind: [timed for timed in timeline.passes if timed.name == kind]
            for kind in ("prefill pass", "decode pass")
        }
        return cls(
            model_name=spec.name,
            plan=plan,
            measured=_measured(plan, highest, how),
            resident_bytes=resident,
            # The counter that samples read is off by a few pages per thread on Linux.
            peak_rss_bytes=max(read_process_memory().peak_bytes, resident),
            seconds=seconds,
            phases=_phases(profiler.phases, seconds),
            layers=_layers(*passes.values()),
            num_timed_passes=(len(passes["prefill pass"]), len(passes["decode pass"])),
            timeline=timeline,
            begin_ns=profiler.begin_ns,
            retention_map=profiler.retention_map,
            buffers=profiler.buffers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON: sizes in bytes, times in seconds."""
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
            "buffers": [
                {"place": one.place, "component": one.component, "bytes": one.num_bytes}
                for one in self.buffers
            ],
            "retention_map": None if self.retention_map is None else self.retention_map.to_dict(),
        }


def _measured(
    plan: MemoryPlan, highest: MemorySample | None, how: Callable[[str], str]
) -> tuple[MeasuredLine, ...]:
    components = [row.component for row in plan.rows] + [OTHER]
    sizes = dict(highest.components) if highest else {}
    # The plan may have components that cannot be measured, and lack some that are.
    sizes[OTHER] = sizes.get(OTHER, 0) + sum(
        sizes.pop(name) for name in list(sizes) if name not in components
    )
    return tuple(
        MeasuredLine(component, sizes.get(component), how(component)) for component in components
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
    """Return the seconds of each layer of a pass, and last those of the output."""
    ends = [*accumulate((0, *timed.ends_ns), max), timed.end_ns - timed.begin_ns]
    return [max(end - begin, 0) / 1e9 for begin, end in pairwise(ends)]


def _attention(passes: list[LayerPass], layer: int) -> float | None:
    seconds = [
        timed.attention_ns[layer] / 1e9
        for timed in passes
        if layer < len(timed.attention_ns) and timed.attention_ns[layer]
    ]
    return _mean(seconds)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
