"""MemoryWatch: tells the resident set apart by the owners of the plan, while a model is at work.

Whatever can be asked about is: file pages, the cache's pages, the kernels' scratch. The rest goes to whom
the anonymous memory grew under, and what grew under nobody is "other". Knows no time.
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
    "rewind": COMPUTE,
    "filter pass": COMPUTE,
    "prefill pass": COMPUTE,
    "decode pass": COMPUTE,
    "sampling": SAMPLING,
    "tokenise": PROMPT,
}
"""Spans, and the owner of what they leave behind. The cache and the scratch grow in passes, too: they are
counted and taken out."""

HOW = {
    INTERPRETER: "what was resident before loading, the libraries, pages of their files",
    VOCABULARY: "grown while the mapped weights were loaded",
    WEIGHTS: "the file's pages in this process",
    CACHE: "pages of its buffers",
    COMPUTE: "grown in passes beside cache and scratch, with llama.cpp's row of logits",
    SCRATCH: "counted by our kernels",
    PREFIXES: "pages of the states that are kept",
    FILTER_PREFILL: "pages of its cache; the rest is with the compute buffer",
    SAMPLING: "grown while sampling",
    PROMPT: "grown while tokenising",
    OTHER: "resident, and nobody's above",
}
HOW_COPIED = {
    VOCABULARY: "not told apart: with the weights",
    WEIGHTS: "grown while they were copied, with the vocabulary",
}
HOW_NOT = {
    LOADING: "given back by then",
    PROFILER: "its own; shows as other",
    RESERVE: "what it is for shows as other",
}
PACE = 100
"""A measurement waits for a hundred times its own cost, so that it takes a hundredth of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedModel:
    """What the watch asks of a model: where its parts lie, and how much the kernels hold."""

    paths: tuple[Path, ...]
    file_bytes: int
    memory_map: bool
    cache_bytes: int
    """The whole cache, which is resident where llama.cpp has cleared it."""
    scratch_bytes: Callable[[], int]
    prefix_bytes: Callable[[], int]


class MemoryWatch:
    """Charges growth to owners; `sample` returns everyone's bytes. Close it at the end."""

    def __init__(self) -> None:
        self._meter = ResidentMemoryMeter()
        self._tells_files = self._meter.tells_files
        self._grown: dict[str, int] = {}
        self._start: ResidentMemory | None = None
        self._model: WatchedModel | None = None
        self._caches: dict[str, Sequence[DemandZeroBuffer]] = {}
        self._mapped = _MappedFiles()

    @property
    def tells_apart(self) -> bool:
        """Whether this system tells enough to name owners."""
        return self._tells_files and self._start is not None

    def read(self) -> ResidentMemory:
        """Return the resident set, in microseconds."""
        return self._meter.read()

    def start(self, model: WatchedModel) -> None:
        """Take what is resident now as the interpreter's; the model is loaded next."""
        self._model = model
        self._start = self.read()

    def cache_lies_in(self, buffers: Sequence[DemandZeroBuffer], component: str = CACHE) -> None:
        """Say where an owner's KV cache is, once it is made; without buffers it was cleared whole."""
        self._caches[component] = tuple(buffers)
        self._mapped.walk_next()

    def charge(self, span: str, before: ResidentMemory, after: ResidentMemory) -> None:
        """Charge what anonymous memory grew by during a span to the owner of its kind."""
        component = GROWS_UNDER.get(span)
        if component is not None:
            grown = after.anonymous_bytes - before.anonymous_bytes
            self._grown[component] = self._grown.get(component, 0) + grown

    def sample(self, now: ResidentMemory) -> dict[str, int]:
        """Return the bytes of each owner that can be told apart; they sum up to what is resident."""
        if not self.tells_apart or self._start is None or self._model is None:
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
        """Say how the owner's bytes were measured, or why they were not."""
        if self._model is not None and not self._model.memory_map and component in HOW_COPIED:
            return HOW_COPIED[component]
        if not self.tells_apart and component != OTHER:
            return "this system does not tell"
        return HOW_NOT.get(component) or HOW.get(component, "not told apart")

    def _cache_bytes(self, model: WatchedModel, component: str) -> int:
        buffers = self._caches[component]
        measured = resident_buffer_bytes(buffers) if buffers else None
        return model.cache_bytes if measured is None else measured

    def close(self) -> None:
        """Give the counters back; a measurement later is none."""
        self._meter.close()


class _MappedFiles:
    """The resident pages of the weights' file: walked now and then, and in between told from the sum.

    Between two walks whatever pages of files come or go are taken for the weights', inside their size.
    """

    def __init__(self) -> None:
        self._walked: int | None = None
        self._file_bytes_then = 0
        self._next_at = 0.0

    def walk_next(self) -> None:
        """Walk at the next question, whatever the last one took."""
        self._next_at = 0.0

    def num_bytes(self, model: WatchedModel, now: ResidentMemory) -> int:
        """Return the resident bytes of the model's files."""
        started = time.perf_counter()
        if self._walked is None or started >= self._next_at:
            self._walked = resident_file_bytes(model.paths) or 0
            self._file_bytes_then = now.file_bytes
            ended = time.perf_counter()
            self._next_at = ended + PACE * (ended - started)
        guess = self._walked + now.file_bytes - self._file_bytes_then
        return min(max(guess, 0), model.file_bytes)
