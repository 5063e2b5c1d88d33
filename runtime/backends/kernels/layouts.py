"""What llama.cpp would allocate for a model: laid out when it is asked for the first time, and stored.

Laying a model out (`models/gguf/dry_run.py`) loads its vocabulary, and takes as long as loading the whole model does.
The sizes are the same until the model's files, llama.cpp or the way in which the process allocates memory change, so
they are stored with these (`models/facts/store.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.attention.bindings.tokenize import install_guarded_tokenizer
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan import estimates
from lowtide.memory.plan.estimates import FormulaSizes, padded_context
from lowtide.memory.process import PEAK_NOISE_BYTES, read_peak_bytes, read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.errors import ModelError
from lowtide.models.facts.store import Facts
from lowtide.models.gguf import dry_run, parameters
from lowtide.models.gguf.dry_run import SimulatedContext, SimulatedGguf
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.models.kind import Kind
from lowtide.models.spec import ModelSpec

SHORTEST_LAYOUT, LONGEST_LAYOUT = 256, 131_072
"""Tokens of the contexts that are laid out; the longest takes 7 MiB."""
LAYOUT_BYTES = 2 * MIB
"""What laying out a context takes beside its graph and its slots: 1 MiB measured."""
SMALL_BATCH = 32
"""The batch size with which a KV cache is laid out: its size does not depend on it."""
VARIABLES = ("GGML_", "LLAMA_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables that begin so may change what llama.cpp and the heap allocate."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class LaidOut:
    """What the process grew by when a model was laid out with its vocabulary, and what the model is for.

    `loading_bytes` is what it took beyond that for a moment, None where an earlier peak hides it.
    """

    vocabulary_bytes: int
    kind: Kind
    loading_bytes: int | None


class Layouts:
    """The layouts of one model; stored ones are used where nothing that they depend on has changed."""

    def __init__(self, spec: ModelSpec, *, after_template: bool = False) -> None:
        self._spec = spec
        # A template that was compiled leaves room between used blocks of the heap, which the vocabulary takes: 0.3 MiB
        # measured in a heap that was trimmed.
        heap = "after a chat template" if after_template else "before any chat template"
        self._facts = Facts.about("layout", spec.path, heap, _environment())
        self._contexts: dict[tuple[int, int, str], SimulatedContext] = {}
        self._simulated: SimulatedGguf | None = None
        self._has_news = self._is_closed = False
        self._measured: LaidOut | None = None
        self._is_stored = True
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self._take(self._facts.read() or {})

    def _take(self, stored: dict[str, Any]) -> None:
        measured = stored.get("measured")
        if measured is not None and measured[1] in get_args(Kind):
            num_bytes, kind, loading_bytes = measured
            self._measured = LaidOut(
                int(num_bytes), kind, None if loading_bytes is None else int(loading_bytes)
            )
        for context, batch_size, kv_type, cache_bytes, compute_bytes in stored["contexts"]:
            self._contexts[context, batch_size, kv_type] = SimulatedContext(
                cache_bytes=cache_bytes, compute_bytes=compute_bytes
            )

    def measured(self, before_bytes: int, *, is_fresh: bool) -> LaidOut:
        """Return what laying the model out adds to the `before_bytes` that are resident now.

        It is measured where it is not stored, and stored where the process `is_fresh`: in another one, the heap may
        have had room already. Raises `ModelError` where llama.cpp refuses the model.
        """
        if self._measured is not None:
            return self._measured
        earlier_peak = read_peak_bytes()
        with guarded_aborts():
            simulated = self._laid_out()
            simulated.hold(SHORTEST_LAYOUT, 1, "f16")
        resident_bytes, peak_bytes = read_process_memory().resident_bytes, read_peak_bytes()
        loading_bytes = peak_bytes - resident_bytes + PEAK_NOISE_BYTES
        simulated.release()
        self._measured = LaidOut(
            max(resident_bytes - before_bytes, 0),
            simulated.kind,
            loading_bytes if peak_bytes > earlier_peak else None,
        )
        self._is_stored, self._has_news = is_fresh, True
        return self._measured

    @property
    def resident_bytes(self) -> int:
        """How much of what was measured is resident now: 0 where the stored sizes sufficed."""
        return self._measured.vocabulary_bytes if self._simulated and self._measured else 0

    def tokenizer(self) -> GgufTokenizer:
        """Return the model's tokenizer, which loads the vocabulary; it is usable until `close`."""
        install_guarded_tokenizer()
        with guarded_aborts():
            return self._laid_out().tokenizer

    def context(self, context: int, batch_size: int, kv_type: str) -> SimulatedContext | None:
        """Return the size of a context; None where llama.cpp does not say it, or it is not known before `close`."""
        key = context, batch_size, kv_type
        if key not in self._contexts and not self._is_closed:
            with contextlib.suppress(ModelError), guarded_aborts():
                self._contexts[key] = self._laid_out().context(*key)
                self._has_news = True
                trim_heap()  # the next layout would otherwise take other pages
        return self._contexts.get(key)

    def _laid_out(self) -> SimulatedGguf:
        if self._simulated is None:
            self._simulated = SimulatedGguf(self._spec)
        return self._simulated

    def close(self) -> None:
        """Store what is new, and free the layout; closing twice is allowed."""
        if self._has_news:
            self._facts.write(self._values(), self._files())
            self._has_news = False
        if self._simulated is not None:
            self._simulated.close()
            trim_heap()
        self._simulated, self._is_closed = None, True

    def _values(self) -> dict[str, Any]:
        measured = self._measured if self._is_stored else None
        return {
            "measured": None
            if measured is None
            else [measured.vocabulary_bytes, measured.kind, measured.loading_bytes],
            "contexts": [
                [*key, found.cache_bytes, found.compute_bytes]
                for key, found in self._contexts.items()
            ],
        }

    def _files(self) -> Iterator[Path]:
        """Yield the files that the sizes depend on: the model's, llama.cpp's, and the code that asks it."""
        yield from self._spec.paths
        yield from _library_files()
        yield from (Path(file or "") for file in (__file__, dry_run.__file__, parameters.__file__))


def _library_files() -> Iterator[Path]:
    file = llama_library().file
    for folder in sorted({file.path.parent, *file.plugin_folders}):
        yield from sorted(path for path in folder.iterdir() if path.name.startswith("lib"))


def _environment() -> str:
    """Return what else the sizes depend on: the processor, the system, and settings of llama.cpp and the heap."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(VARIABLES))
    huge_pages = ""
    with contextlib.suppress(OSError):
        huge_pages = HUGE_PAGES.read_text(encoding="utf-8")
    library = llama_library()
    return "\n".join(
        (platform.platform(), str(library.file.path), library.system_info, huge_pages, *variables)
    )


class SimulatedSizes:
    """`ContextSizes` as llama.cpp lays them out; the formulas where it does not report them.

    llama.cpp stores `KV_SLOT_BYTES` for each slot of a context that it only lays out, too. So no context is laid out
    that is longer than `LONGEST_LAYOUT`, or that takes more than `room_bytes`. Sizes of others lie on a line through
    the shortest context and the next power of two: a compute buffer is a sum of terms that are constant or grow
    with the slots, or the largest of several such sums, and no such function lies above that line. Beyond the
    longest layout the line goes on with its slope or that of the formula, whichever is steeper.
    """

    def __init__(self, spec: ModelSpec, layouts: Layouts, room_bytes: int) -> None:
        self._spec = spec
        self._formulas = FormulaSizes(spec)
        self._layouts: Layouts | None = layouts
        self._longest = SHORTEST_LAYOUT
        while (
            self._longest < LONGEST_LAYOUT and layout_bytes(spec, 2 * self._longest) <= room_bytes
        ):
            self._longest *= 2

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the bytes of the KV cache: the formula's, or more where this architecture needs more."""
        formula, longer = self._formulas.kv_bytes(context, kv_type), self._at_least(context)
        laid_out = self._context(longer, SMALL_BATCH, kv_type)
        if laid_out is None:
            return formula
        more = laid_out.cache_bytes - self._formulas.kv_bytes(longer, kv_type)
        return formula + max(-(-more * padded_context(context) // longer), 0)

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the compute buffer's bytes."""
        context, longer = padded_context(context), self._at_least(context)
        begin = self._context(SHORTEST_LAYOUT, batch_size, kv_type)
        end = self._context(longer, batch_size, kv_type)
        if begin is None or end is None:
            return self._formulas.compute_bytes(context, batch_size, kv_type)
        width = longer - SHORTEST_LAYOUT
        slope = (end.compute_bytes - begin.compute_bytes) / width if width else 0.0
        if context > longer:
            slope = max(slope, estimates.compute_slope(self._spec, batch_size, kv_type))
        return end.compute_bytes + math.ceil(slope * (context - longer))

    def _at_least(self, context: int) -> int:
        """Return the shortest context to lay out that has so many tokens, or the longest of them."""
        longer = SHORTEST_LAYOUT
        while longer < min(context, self._longest):
            longer *= 2
        return longer

    def slot_bytes(self, context: int, num_used: int) -> int:
        """Return the bytes of llama.cpp's list of KV slots."""
        return self._formulas.slot_bytes(context, num_used)

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the bytes of a second context: its compute buffer, its slots and one token's logits."""
        compute_bytes = self.compute_bytes(context, batch_size, kv_type)
        return estimates.second_context_bytes(self._spec, compute_bytes, context)

    def _context(self, context: int, batch_size: int, kv_type: str) -> SimulatedContext | None:
        return self._layouts.context(context, batch_size, kv_type) if self._layouts else None

    def close(self) -> None:
        """Free the layout; the formulas are used from now on."""
        if self._layouts is not None:
            self._layouts.close()
        self._layouts = None


def layout_bytes(spec: ModelSpec, context: int) -> int:
    """Return what laying out a context takes beside the model's own layout, at most."""
    graph = estimates.structure_bytes(spec) + LAYOUT_BYTES
    return graph + estimates.slot_bytes(spec, context, 0)
