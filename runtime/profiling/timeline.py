"""Timeline: what happened when, in compact arrays that stay small however long a run is.

Knows no model and draws nothing. Times are nanoseconds of the profiler's clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from lowtide.memory.plan.estimates import PROFILER_SAMPLES, PROFILER_SPANS

MAX_SPANS, MAX_SAMPLES = PROFILER_SPANS, PROFILER_SAMPLES


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time; `depth` spans are around it, `num_rows` went through a pass."""

    name: str
    begin_ns: int
    end_ns: int
    depth: int
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What was resident at a moment, by owner; an owner that cannot be told apart is missing."""

    at_ns: int
    resident_bytes: int
    components: dict[str, int]
    num_tokens: int
    """In the KV cache."""


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One timed pass: when each layer ended and its time in our attention, since `begin_ns`."""

    name: str
    begin_ns: int
    end_ns: int
    ends_ns: tuple[int, ...]
    attention_ns: tuple[int, ...]


class Timeline:
    """Spans, memory samples and timed passes, in the order in which they ended.

    Of the first there are at most 50,000, then `num_dropped` counts; of samples 2,000, which are thinned
    out to half of them whenever they are full; of timed passes as many.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._spans = array("q")
        self.samples: list[MemorySample] = []
        self.passes: list[LayerPass] = []
        self.num_dropped = 0

    def add_span(self, span: Span) -> None:
        """Keep a span, or count it as dropped."""
        if len(self._spans) >= 5 * MAX_SPANS:
            self.num_dropped += 1
            return
        if span.name not in self._names:
            self._names.append(span.name)
        name_id = self._names.index(span.name)
        self._spans.extend((name_id, span.begin_ns, span.end_ns, span.depth, span.num_rows))

    def add_sample(self, sample: MemorySample) -> None:
        """Keep a sample; the highest one is never thinned out."""
        if len(self.samples) >= MAX_SAMPLES:
            highest = max(self.samples, key=lambda some: some.resident_bytes)
            self.samples = [s for i, s in enumerate(self.samples) if i % 2 == 0 or s is highest]
        self.samples.append(sample)

    def add_pass(self, timed: LayerPass) -> None:
        """Keep a timed pass, while there is room."""
        if len(self.passes) < MAX_SAMPLES:
            self.passes.append(timed)

    @property
    def spans(self) -> Iterator[Span]:
        """Every span that was kept."""
        fields = self._spans
        for at in range(0, len(fields), 5):
            name_id, begin, end, depth, num_rows = fields[at : at + 5]
            yield Span(self._names[name_id], begin, end, depth, num_rows)
