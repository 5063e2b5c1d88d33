"""Profiler: observes one runtime and records its time by phase and layer, and its memory by component.

Pass one to `Runtime.open`; `report` returns what it has recorded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lowtide.attention.bindings.llama_hook import LayerClock, LlamaHook
from lowtide.memory.os.kv_pages import DemandZeroBuffer
from lowtide.memory.os.residency import ResidentMemory
from lowtide.memory.plan.line import CACHE
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.models.errors import BadOption
from lowtide.models.gguf.buffers import Buffer
from lowtide.models.spec import ModelSpec
from lowtide.runtime.profiling.memory import PACE, MemoryWatch, WatchedModel
from lowtide.runtime.profiling.retention_map import RetentionMap
from lowtide.runtime.profiling.timeline import LayerPass, MemorySample, Span, Timeline

if TYPE_CHECKING:
    from lowtide.runtime.profiling.report import ProfileReport

    OnEvent = Callable[[Span | MemorySample | LayerPass], None]

PREFILL, DECODE, FILTER = "prefill pass", "decode pass", "filter pass"
DECODE_PACES = (8, 32)
"""Layers are timed in every 8th decode pass at first, and in every 32nd later, because it has a cost."""
EARLY_DECODES = 64
"""The number of decode passes after which the slower pace applies."""
STEP_BYTES = 1 << 20
"""A change of the resident set by this much is sampled at once."""


class Profiler:
    """Records spans, memory by component, and time by layer of one runtime.

    `on_event` is called with each `Span`, `MemorySample` and `LayerPass` when it ends, in the runtime's
    thread; it must be fast. `span` records spans of your own. Use one profiler per runtime.
    """

    def __init__(self, on_event: OnEvent | None = None) -> None:
        self.timeline = Timeline()
        self._on_event = on_event
        self._watch = MemoryWatch()
        self._clock: LayerClock | None = None
        self._planned: tuple[ModelSpec, MemoryPlan] | None = None
        self._num_tokens: Callable[[], int] = lambda: 0
        self._seconds: dict[str, tuple[int, int]] = {}
        self._open: list[_OpenSpan] = []
        self._num_decoded = 0
        self.retention_map: RetentionMap | None = None
        self.buffers: tuple[Buffer, ...] = ()
        self._is_finished = False
        self._sampled_bytes = 0
        self._next_sample_ns = 0
        self.begin_ns = self.end_ns = time.perf_counter_ns()

    @property
    def wants_layers(self) -> bool:
        """Whether to time layers, which needs a hook."""
        return True

    def span(self, name: str, num_rows: int = 0) -> contextlib.AbstractContextManager[object]:
        """Time the block under `name`; spans may be nested."""
        return _OpenSpan(self, name, num_rows)

    def watch(self, spec: ModelSpec, plan: MemoryPlan, model: WatchedModel) -> None:
        """Observe a runtime, before its model is loaded. Raises `BadOption` for a second one."""
        if self._planned is not None:
            raise BadOption(
                "this profiler already observes a runtime: create one profiler per runtime"
            )
        self._planned = spec, plan
        self._watch.start(model)

    def cache_lies_in(self, buffers: Sequence[DemandZeroBuffer], component: str = CACHE) -> None:
        """Set the buffers of a component's KV cache, after they are allocated."""
        self._watch.cache_lies_in(buffers, component)

    def allocated(self, buffers: tuple[Buffer, ...]) -> None:
        """Record the buffers of the model, as the engine reports them."""
        self.buffers = buffers

    def count_tokens(self, num_tokens: Callable[[], int]) -> None:
        """Set the function that returns the number of tokens in the KV cache."""
        self._num_tokens = num_tokens

    def filtered(self, retention_map: Callable[[], RetentionMap]) -> None:
        """Record which tokens of a prompt a filter retained."""
        self.retention_map = retention_map()

    def time_layers(self, hook: LlamaHook, num_layers: int) -> None:
        """Time the layers in the hook's passes, until `finish`."""
        self._clock = LayerClock(hook, num_layers)

    def finish(self) -> None:
        """Stop measuring; the records stay. Called when the runtime closes."""
        if self._planned is not None and not self._is_finished:
            self._sample(self._watch.read(), time.perf_counter_ns())
        self._is_finished = True
        self._clock = None
        self._num_tokens = lambda: 0
        self._watch.close()

    def report(self) -> ProfileReport:
        """Return the report so far. Raises `BadOption` if no runtime was opened with this profiler."""
        from lowtide.runtime.profiling.report import ProfileReport

        if self._planned is None:
            raise BadOption(
                "no runtime was opened with this profiler: pass it to Runtime.open(profiler=...)"
            )
        return ProfileReport.of(*self._planned, self, self._watch.how)

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, nanoseconds without nested spans, and number of each kind of span."""
        return [(name, *values) for name, values in self._seconds.items()]

    def _begin(self, span: _OpenSpan) -> None:
        self._open.append(span)
        span.before = self._watch.read()
        if self._clock is not None and span.name in (PREFILL, DECODE):
            is_due = self._num_decoded % DECODE_PACES[self._num_decoded >= EARLY_DECODES] == 0
            self._num_decoded += span.name == DECODE
            span.is_timed = span.name == PREFILL or is_due
            self._clock.start(timed=span.is_timed)
        span.begin_ns = time.perf_counter_ns()

    def _end(self, span: _OpenSpan) -> None:
        end_ns = self.end_ns = time.perf_counter_ns()
        after = self._watch.read()
        self._open.remove(span)
        duration = end_ns - span.begin_ns
        if self._open:
            self._open[-1].nested_ns += duration
        self._charge(span.name, duration - span.nested_ns)
        self._watch.charge(span.name, span.before, after)
        depth = len(self._open)
        ended = Span(span.name, span.begin_ns, end_ns, depth, span.num_rows)
        self.timeline.add_span(ended)
        self._notify(ended)
        if span.is_timed and self._clock is not None:
            self._record_layers(ended, self._clock)
        if self._is_time_to_sample(after, end_ns):
            self._sample(after, end_ns)

    def _charge(self, name: str, nanoseconds: int) -> None:
        before, calls = self._seconds.get(name, (0, 0))
        self._seconds[name] = before + nanoseconds, calls + 1

    def _record_layers(self, span: Span, clock: LayerClock) -> None:
        ends, attention = clock.read()
        if not any(ends):
            return
        timed = LayerPass(span.name, span.begin_ns, span.end_ns, tuple(ends), tuple(attention))
        self.timeline.add_pass(timed)
        self._notify(timed)

    def _is_time_to_sample(self, now: ResidentMemory, at_ns: int) -> bool:
        changed = abs(now.num_bytes - self._sampled_bytes)
        return at_ns >= self._next_sample_ns or changed >= STEP_BYTES

    def _sample(self, now: ResidentMemory, at_ns: int) -> None:
        """Sample the bytes of every component; the time for that is a phase of its own."""
        sample = MemorySample(at_ns, now.num_bytes, self._watch.sample(now), self._num_tokens())
        self.timeline.add_sample(sample)
        self._sampled_bytes = now.num_bytes
        self.end_ns = time.perf_counter_ns()
        cost = self.end_ns - at_ns
        self._next_sample_ns = at_ns + (1 + PACE) * cost
        self._charge("profiling", cost)
        if self._open:
            self._open[-1].nested_ns += cost
        self._notify(sample)

    def _notify(self, event: Span | MemorySample | LayerPass) -> None:
        if self._on_event is not None:
            self._on_event(event)


class _OpenSpan:
    """A span that has not ended. A class is faster than a generator: every token has three spans."""

    __slots__ = ("_profiler", "before", "begin_ns", "is_timed", "name", "nested_ns", "num_rows")

    def __init__(self, profiler: Profiler, name: str, num_rows: int) -> None:
        self._profiler = profiler
        self.name = name
        self.num_rows = num_rows
        self.before = ResidentMemory(0, 0)
        self.begin_ns = self.nested_ns = 0
        self.is_timed = False

    def __enter__(self) -> None:
        self._profiler._begin(self)

    def __exit__(self, *_error: object) -> None:
        self._profiler._end(self)


class _Silent(Profiler):
    """The default if there is no profiler: records nothing and takes no time."""

    _NOTHING = contextlib.nullcontext()

    def __init__(self) -> None:
        """Create no timeline."""

    @property
    def wants_layers(self) -> bool:
        """No layers are timed."""
        return False

    def span(self, name: str, num_rows: int = 0) -> contextlib.AbstractContextManager[object]:
        """Run the block."""
        return self._NOTHING

    def watch(self, spec: ModelSpec, plan: MemoryPlan, model: WatchedModel) -> None:
        """Observe nothing."""

    def cache_lies_in(self, buffers: Sequence[DemandZeroBuffer], component: str = CACHE) -> None:
        """Ignore the buffers."""

    def allocated(self, buffers: tuple[Buffer, ...]) -> None:
        """Ignore the buffers."""

    def count_tokens(self, num_tokens: Callable[[], int]) -> None:
        """Count nothing."""

    def filtered(self, retention_map: Callable[[], RetentionMap]) -> None:
        """Ignore the prompt."""

    def time_layers(self, hook: LlamaHook, num_layers: int) -> None:
        """Time nothing."""

    def finish(self) -> None:
        """Nothing has to stop."""


SILENT: Profiler = _Silent()
