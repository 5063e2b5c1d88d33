"""The process baseline of a GGUF model, measured before anything is loaded.

The libraries that an answer needs are imported and llama.cpp lays the model out without its weights
(`models/gguf/dry_run.py`). What is resident then is what a loaded model needs beside its weights, KV cache
and compute buffer. Where that is impossible, the formulas of `memory/plan/estimates.py` are used.
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
from lowtide.memory.plan import estimates
from lowtide.memory.plan.estimates import ContextSizes, FormulaSizes
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import ModelError, TemplateError
from lowtide.models.gguf.dry_run import SimulatedContext, SimulatedGguf
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec

SMALL_BATCH = 32
"""The batch size with which a KV cache is laid out: its size does not depend on it."""
TOLERANCE_BYTES = MIB
"""How much the measured size may differ between two runs of a command: 0.1 MiB was observed."""
PRELOADED_MODULES = ("lowtide.runtime.runtime", "lowtide.runtime.generation.sampling")
"""Modules that an answer needs. They are imported before memory is measured, and their `preload()` runs, so
that the measured size includes the code pages of the first answer. A sampling option that uses new numpy
functions must use them in `preload()` too. The names are text because these modules import this one.
"""


class SimulatedSizes:
    """`ContextSizes` as llama.cpp lays them out; the formulas where it does not report them."""

    def __init__(self, spec: ModelSpec, simulated: SimulatedGguf) -> None:
        self._spec = spec
        self._formulas = FormulaSizes(spec)
        self._simulated: SimulatedGguf | None = simulated

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the bytes of the KV cache: the formula's, or more where this architecture needs more."""
        formula = self._formulas.kv_bytes(context, kv_type)
        laid_out = self._context(context, SMALL_BATCH, kv_type)
        return max(formula, laid_out.cache_bytes) if laid_out else formula

    def compute_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the compute buffer's bytes."""
        laid_out = self._context(context, batch_size, kv_type)
        if laid_out is None:
            return self._formulas.compute_bytes(context, batch_size, kv_type)
        return laid_out.compute_bytes

    def filter_context_bytes(self, context: int, batch_size: int, kv_type: str) -> int:
        """Return the bytes of a second context: its compute buffer and one token's logits."""
        compute_bytes = self.compute_bytes(context, batch_size, kv_type)
        return estimates.second_context_bytes(self._spec, compute_bytes)

    def _context(self, context: int, batch_size: int, kv_type: str) -> SimulatedContext | None:
        if self._simulated is None:
            return None
        with contextlib.suppress(ModelError), guarded_aborts():
            return self._simulated.context(context, batch_size, kv_type)
        return None

    def close(self) -> None:
        """Free the layout; the formulas are used from now on."""
        if self._simulated is not None:
            self._simulated.close()
            trim_heap()
        self._simulated = None


@contextlib.contextmanager
def measured_baseline(
    spec: ModelSpec, budget: Budget
) -> Iterator[tuple[ProcessBaseline, ContextSizes]]:
    """Yield the baseline and the context sizes to plan `spec` with; the layout is freed at the end.

    A budget that the libraries, or the vocabulary beside them, would exceed is planned with the formulas, so
    that planning itself never exceeds it.
    """
    resident = estimates.interpreter_bytes(read_process_memory())
    # Not checked against llama.cpp yet: a budget that only fits with these is checked when it is given.
    is_linux = sys.platform == "linux"
    formulas = ProcessBaseline(
        interpreter_bytes=resident,
        processor=platform.machine(),
        kv_on_demand=is_linux and estimates.kv_token_bytes(spec, "f16") is not None,
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
    _preload(spec)
    before = read_process_memory().resident_bytes
    laid_out = estimates.vocabulary_bytes(spec.vocabulary) + estimates.loading_bytes(spec)
    if before + laid_out > budget.num_bytes:
        yield replace(formulas, interpreter_bytes=before), FormulaSizes(spec)
        return
    try:
        with guarded_aborts():
            simulated = SimulatedGguf(spec)
            simulated.context(estimates.KV_PADDING, 1, "f16")
    except ModelError:
        yield _baseline(spec, before, vocabulary=False), FormulaSizes(spec)
        return
    sizes = SimulatedSizes(spec, simulated)
    try:
        yield _baseline(spec, before), sizes
    finally:
        sizes.close()


def _baseline(spec: ModelSpec, before_bytes: int, *, vocabulary: bool = True) -> ProcessBaseline:
    """Return the baseline while the model is laid out, or without its vocabulary where it is not."""
    grown_bytes = max(read_process_memory().resident_bytes - before_bytes, 0)
    return ProcessBaseline(
        interpreter_bytes=before_bytes,
        processor=platform.machine(),
        kv_on_demand=can_use_demand_zero() and estimates.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=can_map_lazily(),
        repacks=llama_library().repacks,
        vocabulary_bytes=grown_bytes if vocabulary else None,
        tolerance_bytes=TOLERANCE_BYTES,
    )


def _preload(spec: ModelSpec) -> None:
    """Import libraries and fault in the code pages that the first answer runs."""
    modules = [importlib.import_module(name) for name in PRELOADED_MODULES]
    if read_process_memory().resident_bytes < estimates.INTERPRETER_BYTES:  # no host program
        release_startup_pages()
    fault_in(address_of(native_library().lowtide_native_version))
    fault_in(llama_library().address("ggml_get_type_traits_cpu"))
    for module in modules:  # after the pages that the imports read were released
        getattr(module, "preload", lambda: None)()
    hashlib.sha256(bytes(1024)).digest()  # saving a session computes such a digest
    with contextlib.suppress(TemplateError):
        ChatTemplate(spec.chat_template, {})
