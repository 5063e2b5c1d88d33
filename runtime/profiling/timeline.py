"""Timeline: spans, memory samples and timed passes of a run, in compact arrays of bounded size.

Times are nanoseconds of the profiler's clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from lowtide.memory.plan.estimates import PROFILER_SAMPLES, PROFILER_SPANS

MAX_SPANS, MAX_SAMPLES = PROFILER_SPANS, PROFILER_SAMPLES


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work; `depth` spans enclose it. `num_rows` is the number of tokens of a pass."""

    name: str
    begin_ns: int
    end_ns: int
    depth: int
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident bytes by component; a component that cannot be measured is missing."""

    at_ns: int
    resident_bytes: int
    components: dict[str, int]
    num_tokens: int
    """Number of tokens in the KV cache."""


@dataclass(frozen=True, slots=True)
class LayerPass:
    """A timed pass: the end of each layer since `begin_ns`, and its time in lowtide's attention."""

    name: str
    begin_ns: int
    end_ns: int
    ends_ns: tuple[int, ...]
    attention_ns: tuple[int, ...]


class Timeline:
    """Spans, memory samples and timed passes, in the order in which they ended.

    After 50,000 spans, further ones are only counted in `num_dropped`. After 2,000 samples, every second
    one is removed. After 2,000 timed passes, further ones are ignored.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._spans = array("q")
        self.samples: list[MemorySample] = []
        self.passes: list[LayerPass] = []
        self.num_dropped = 0

    def add_span(self, span: Span) -> None:
        """Record a span, or count it as dropped."""
        if len(self._spans) >= 5 * MAX_SPANS:
            self.num_dropped += 1
            return
        if span.name not in self._names:
            self._names.append(span.name)
        name_id = self._names.index(span.name)
        self._spans.extend((name_id, span.begin_ns, span.end_ns, span.depth, span.num_rows))

    def add_sample(self, sample: MemorySample) -> None:
        """Record a sample; the one with the most resident bytes is never removed."""
        if len(self.samples) >= MAX_SAMPLES:
            highest = max(self.samples, key=lambda one: one.resident_bytes)
            self.samples = [s for i, s in enumerate(self.samples) if i % 2 == 0 or s is highest]
        self.samples.append(sample)

    def add_pass(self, timed: LayerPass) -> None:
        """Record a timed pass if there is room."""
        if len(self.passes) < MAX_SAMPLES:
            self.passes.append(timed)

    @property
    def spans(self) -> Iterator[Span]:
        """Every recorded span."""
        fields = self._spans
        for at in range(0, len(fields), 5):
            name_id, begin, end, depth, num_rows = fields[at : at + 5]
            yield Span(self._names[name_id], begin, end, depth, num_rows)
