"""What the plan should know of this process and of llama.cpp, measured before anything is loaded.

The libraries that an answer needs are imported, the model is laid out without its weights, and what is
resident then is what an open model needs beside weights, cache and buffers. Where that cannot be done, the
formulas of `memory.plan.estimates` stand in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace

from lowtide.attention.bindings.library import can_map_lazily, guarded_aborts, native_library
from lowtide.memory.budget import Budget
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.os.shared_libraries import address_of, fault_in, release_startup_pages
from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan.estimates import ContextSizes, FormulaSizes
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import ModelError, TemplateError
from lowtide.models.gguf.dry_run import SimulatedContext, SimulatedGguf
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec

SMALL_PASS = 32
"""Rows of a pass that a cache is laid out with: its size does not depend on them."""
TOLERANCE_BYTES = MIB
"""From one run of a command to the next the same state measured within 0.1 MiB."""
PRELOADED_MODULES = ("lowtide.runtime.runtime", "lowtide.runtime.generation.sampling")
"""Modules that an answer needs. They are imported before memory is measured, and their `preload()` runs, so
that the measured size includes the code pages of the first answer. They are named as text because they
import this one.
"""


class SimulatedSizes:
    """`ContextSizes` as llama.cpp lays them out, and the formulas where it does not tell."""

    def __init__(self, spec: ModelSpec, simulated: SimulatedGguf) -> None:
        self._spec = spec
        self._formulas = FormulaSizes(spec)
        self._simulated: SimulatedGguf | None = simulated

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes: the formula's, or more where this architecture keeps more."""
        formula = self._formulas.kv_bytes(context, kv_type)
        laid_out = self._context(context, SMALL_PASS, kv_type)
        return max(formula, laid_out.cache_bytes) if laid_out else formula

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the compute buffer's bytes."""
        laid_out = self._context(context, batch_size, kv_type)
        if laid_out is None:
            return self._formulas.compute_bytes(context, batch_size, kv_type)
        return laid_out.compute_bytes

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return a compute buffer of its own, and a row of logits."""
        computing = self.compute_bytes(context, batch_size, kv_type)
        return footprint.second_context_bytes(self._spec, computing)

    def _context(self, context: int, batch_size: int, kv_type: str) -> SimulatedContext | None:
        if self._simulated is None:
            return None
        with contextlib.suppress(ModelError), guarded_aborts():
            return self._simulated.context(context, batch_size, kv_type)
        return None

    def close(self) -> None:
        """Free the layout; the formulas answer from now on."""
        if self._simulated is not None:
            self._simulated.close()
            trim_heap()
        self._simulated = None


@contextlib.contextmanager
def measured_baseline(
    spec: ModelSpec, budget: Budget
) -> Iterator[tuple[ProcessBaseline, ContextSizes]]:
    """Yield the host and the sizes to plan `spec` with; what was laid out is freed at the end.

    A budget that could not hold the libraries, or not the vocabulary beside them, is planned by the
    formulas, so that nothing passes it.
    """
    resident = footprint.interpreter_bytes(read_process_memory())
    # Not held against llama.cpp yet: who comes back with the bound that this gives is told if it is not so.
    is_linux = sys.platform == "linux"
    formulas = ProcessBaseline(
        interpreter_bytes=resident,
        processor=platform.machine(),
        kv_on_demand=is_linux and footprint.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=is_linux,
    )
    if not spec.path.is_file():
        yield (
            ProcessBaseline(interpreter_bytes=resident, processor=platform.machine()),
            FormulaSizes(spec),
        )
        return
    if resident > budget.num_bytes:
        yield formulas, FormulaSizes(spec)
        return
    _load_what_answers_need(spec)
    before = read_process_memory().resident_bytes
    laid_out = footprint.vocabulary_bytes(spec.vocabulary) + footprint.loading_bytes(spec)
    if before + laid_out > budget.num_bytes:
        yield replace(formulas, interpreter_bytes=before), FormulaSizes(spec)
        return
    try:
        with guarded_aborts():
            simulated = SimulatedGguf(spec)
            simulated.context(footprint.KV_PADDING, 1, "f16")
    except ModelError:
        yield _baseline(spec, before, vocabulary=False), FormulaSizes(spec)
        return
    sizes = SimulatedSizes(spec, simulated)
    try:
        yield _baseline(spec, before), sizes
    finally:
        sizes.close()


def _baseline(spec: ModelSpec, before_bytes: int, *, vocabulary: bool = True) -> ProcessBaseline:
    """The host as it is while the model is laid out, or without its vocabulary where it was not."""
    held_bytes = max(read_process_memory().resident_bytes - before_bytes, 0)
    return ProcessBaseline(
        interpreter_bytes=before_bytes,
        processor=platform.machine(),
        kv_on_demand=can_use_demand_zero() and footprint.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=can_map_lazily(),
        repacks=llama_library().repacks,
        vocabulary_bytes=held_bytes if vocabulary else None,
        tolerance_bytes=TOLERANCE_BYTES,
    )


def _load_what_answers_need(spec: ModelSpec) -> None:
    """Libraries, and of their code what the first answer would read in."""
    modules = [importlib.import_module(name) for name in PRELOADED_MODULES]
    if read_process_memory().resident_bytes < footprint.INTERPRETER_BYTES:  # nobody's but ours
        release_startup_pages()
    fault_in(address_of(native_library().lowtide_native_version))
    fault_in(llama_library().address("ggml_get_type_traits_cpu"))
    for module in modules:  # only now: the line above released the pages that imports had read
        getattr(module, "preload", lambda: None)()
    hashlib.sha256(bytes(1024)).digest()  # saving a session computes one
    with contextlib.suppress(TemplateError):
        ChatTemplate(spec.chat_template, {})
