"""MemoryWatch: divides the resident set among the components of the plan, while a model is running.

File pages, the KV cache's pages and the kernels' scratch are measured directly. Growth of the remaining
anonymous memory is charged to the component of the span in which it happened, and otherwise to "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory.os.kv_pages import DemandZeroBuffer
from lowtide.memory.os.residency import (
    ResidentMemory,
    ResidentMemoryMeter,
    resident_buffer_bytes,
    resident_file_bytes,
)
from lowtide.memory.plan.line import (
    CACHE,
    COMPUTE,
    DRIVER,
    FILTER_PREFILL,
    INTERPRETER,
    LOADING,
    PREFIXES,
    PROFILER,
    PROMPT,
    RESERVE,
    SAMPLING,
    SCRATCH,
    VOCABULARY,
    WEIGHTS,
)

OTHER = "other"

GROWS_UNDER = {
    "libraries": INTERPRETER,
    "template": INTERPRETER,  # the first one imports jinja2
    "weights": WEIGHTS,
    "context": COMPUTE,
    "truncate": COMPUTE,
    "restore": COMPUTE,
    "filter pass": COMPUTE,
    "prefill pass": COMPUTE,
    "decode pass": COMPUTE,
    "sampling": SAMPLING,
    "tokenise": PROMPT,
}
"""Spans, and the component that is charged for the memory they leave behind. The KV cache and the scratch grow
in passes as well; they are measured directly and subtracted."""

HOW = {
    INTERPRETER: "resident before loading, and the libraries with their files",
    VOCABULARY: "growth while the mapped weights were loaded",
    WEIGHTS: "resident pages of the file",
    CACHE: "resident pages of its buffers",
    COMPUTE: "growth in passes without KV cache and scratch, with llama.cpp's logits",
    SCRATCH: "counted by lowtide's kernels",
    PREFIXES: "pages of the cached KV snapshots",
    FILTER_PREFILL: "resident pages of its KV cache; the rest counts as compute buffer",
    SAMPLING: "growth while sampling",
    PROMPT: "growth while tokenising",
    OTHER: "resident, but of no component above",
}
HOW_COPIED = {
    VOCABULARY: "included in the weights",
    WEIGHTS: "growth while they were copied, with the vocabulary",
}
HOW_NOT = {
    DRIVER: "included in the compute buffer and in other: it grows in passes",
    LOADING: "already released",
    PROFILER: "included in other",
    RESERVE: "included in other",
}
PACE = 100
"""The pause after a measurement, in multiples of its cost: measuring takes 1 % of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedModel:
    """What the watch needs to know about a model: its files, and how to ask for measured sizes."""

    paths: tuple[Path, ...]
    file_bytes: int
    memory_map: bool
    cache_bytes: int
    """The size of the whole KV cache, which is resident if llama.cpp has cleared it."""
    scratch_bytes: Callable[[], int]
    prefix_bytes: Callable[[], int]


class MemoryWatch:
    """Charges growth to components; `sample` returns the bytes of all. Close it at the end."""

    def __init__(self) -> None:
        self._meter = ResidentMemoryMeter()
        self._separates_files = self._meter.separates_files
        self._grown: dict[str, int] = {}
        self._start: ResidentMemory | None = None
        self._model: WatchedModel | None = None
        self._caches: dict[str, Sequence[DemandZeroBuffer]] = {}
        self._mapped = _MappedFiles()

    @property
    def can_separate(self) -> bool:
        """Whether this system reports enough to divide the resident set."""
        return self._separates_files and self._start is not None

    def read(self) -> ResidentMemory:
        """Return the resident set; takes microseconds."""
        return self._meter.read()

    def start(self, model: WatchedModel) -> None:
        """Charge everything that is resident now to the interpreter. Call it before the model is loaded."""
        self._model = model
        self._start = self.read()

    def cache_lies_in(self, buffers: Sequence[DemandZeroBuffer], component: str = CACHE) -> None:
        """Set the buffers of a component's KV cache; without buffers, the whole cache counts as resident."""
        self._caches[component] = tuple(buffers)
        self._mapped.read_next()

    def charge(self, span: str, before: ResidentMemory, after: ResidentMemory) -> None:
        """Charge the growth of the anonymous memory during a span to the component of the span."""
        component = GROWS_UNDER.get(span)
        if component is not None:
            grown = after.anonymous_bytes - before.anonymous_bytes
            self._grown[component] = self._grown.get(component, 0) + grown

    def sample(self, now: ResidentMemory) -> dict[str, int]:
        """Return the bytes of each component that can be measured; their sum is the resident set."""
        if not self.can_separate or self._start is None or self._model is None:
            return {OTHER: now.num_bytes}
        model, grown = self._model, self._grown
        mapped = self._mapped.num_bytes(model, now) if model.memory_map else 0
        scratch = model.scratch_bytes()
        caches = {component: self._cache_bytes(model, component) for component in self._caches}
        components = {
            INTERPRETER: self._start.anonymous_bytes + grown.get(INTERPRETER, 0)
            + now.file_bytes - mapped,
            CACHE: 0, **caches,
            COMPUTE: grown.get(COMPUTE, 0) - sum(caches.values()) - scratch,
            SCRATCH: scratch,
            PREFIXES: model.prefix_bytes(),
            SAMPLING: grown.get(SAMPLING, 0),
            PROMPT: grown.get(PROMPT, 0),
        }  # fmt: skip
        if model.memory_map:
            components.update({VOCABULARY: grown.get(WEIGHTS, 0), WEIGHTS: mapped})
        else:
            components[WEIGHTS] = grown.get(WEIGHTS, 0)
        components[OTHER] = now.num_bytes - sum(components.values())
        return components

    def how(self, component: str) -> str:
        """Return how a component's bytes were measured, or why they were not."""
        if self._model is not None and not self._model.memory_map and component in HOW_COPIED:
            return HOW_COPIED[component]
        if not self.can_separate and component != OTHER:
            return "not available on this system"
        return HOW_NOT.get(component) or HOW.get(component, "not measured")

    def _cache_bytes(self, model: WatchedModel, component: str) -> int:
        buffers = self._caches[component]
        measured = resident_buffer_bytes(buffers) if buffers else None
        return model.cache_bytes if measured is None else measured

    def close(self) -> None:
        """Close the counters; later samples have only a total."""
        self._meter.close()


class _MappedFiles:
    """The resident pages of the model's files: read from smaps now and then, estimated in between.

    Between two readings, every change of the resident file pages counts as a change of the weights.
    """

    def __init__(self) -> None:
        self._resident: int | None = None
        self._file_bytes_then = 0
        self._next_at = 0.0

    def read_next(self) -> None:
        """Read smaps at the next call, whatever the last reading cost."""
        self._next_at = 0.0

    def num_bytes(self, model: WatchedModel, now: ResidentMemory) -> int:
        """Return the resident bytes of the model's files."""
        started = time.perf_counter()
        if self._resident is None or started >= self._next_at:
            self._resident = resident_file_bytes(model.paths) or 0
            self._file_bytes_then = now.file_bytes
            ended = time.perf_counter()
            self._next_at = ended + PACE * (ended - started)
        estimate = self._resident + now.file_bytes - self._file_bytes_then
        return min(max(estimate, 0), model.file_bytes)
