"""The process baseline of a GGUF model, measured before anything is loaded.

The libraries that an answer needs are imported and llama.cpp lays the model out without its weights
(`models/gguf/dry_run.py`). What is resident then is what a loaded model needs beside its weights, KV cache
and compute buffer. Where that is impossible, the formulas of `memory/plan/estimates.py` are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace

from lowtide.attention.bindings.library import can_map_lazily, guarded_aborts, native_library
from lowtide.attention.bindings.tokenize import install_guarded_tokenizer
from lowtide.memory.budget import Budget
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.os.shared_libraries import address_of, fault_in, release_startup_pages
from lowtide.memory.plan import estimates
from lowtide.memory.plan.estimates import ContextSizes, FormulaSizes, padded_context
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import ModelError, TemplateError
from lowtide.models.gguf.dry_run import SimulatedContext, SimulatedGguf
from lowtide.models.gguf.llama_cpp import is_loaded, llama_library
from lowtide.models.kind import require_decoder
from lowtide.models.spec import ModelSpec
from lowtide.models.template.families import LONGEST_TEMPLATE
from lowtide.runtime.backends.backend import PlannedPrompt, prompt_tokens_of

PRELOAD_BYTES = 12 * MIB
"""What the libraries of an answer take, once, beside those of the command line: 8 to 11 MiB measured."""
SHORTEST_LAYOUT, LONGEST_LAYOUT = 256, 131_072
"""Tokens of the contexts that are laid out; the longest takes 7 MiB."""
LAYOUT_BYTES = 2 * MIB
"""What laying out a context takes beside its graph and its slots: 1 MiB measured."""
TEMPLATE_PEAK_SHARE = 4
"""Compiling a template takes at its peak a quarter more than what is resident right afterwards."""
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
    """`ContextSizes` as llama.cpp lays them out; the formulas where it does not report them.

    llama.cpp stores `KV_SLOT_BYTES` for each slot of a context that it only lays out, too. So no context is laid out
    that is longer than `LONGEST_LAYOUT`, or that takes more than `room_bytes`. Sizes of others lie on a line through
    the shortest context and the next power of two: a compute buffer is a sum of terms that are constant or grow
    with the slots, or the largest of several such sums, and no such function lies above that line. Beyond the
    longest layout the line goes on with its slope or that of the formula, whichever is steeper.
    """

    def __init__(self, spec: ModelSpec, simulated: SimulatedGguf, room_bytes: int) -> None:
        self._spec = spec
        self._formulas = FormulaSizes(spec)
        self._simulated: SimulatedGguf | None = simulated
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
        if self._simulated is None:
            return None
        with contextlib.suppress(ModelError), guarded_aborts():
            before = self._simulated.num_laid_out
            laid_out = self._simulated.context(context, batch_size, kv_type)
            if self._simulated.num_laid_out > before:
                trim_heap()  # the next layout would otherwise take other pages
            return laid_out
        return None

    def close(self) -> None:
        """Free the layout; the formulas are used from now on."""
        if self._simulated is not None:
            self._simulated.close()
            trim_heap()
        self._simulated = None


def layout_bytes(spec: ModelSpec, context: int) -> int:
    """Return what laying out a context takes beside the model's own layout, at most."""
    graph = estimates.structure_bytes(spec) + LAYOUT_BYTES
    return graph + estimates.slot_bytes(spec, context, 0)


@contextlib.contextmanager
def measured_baseline(
    spec: ModelSpec, budget: Budget, prompt: PlannedPrompt | None = None
) -> Iterator[tuple[ProcessBaseline, ContextSizes]]:
    """Yield the baseline and the context sizes to plan `spec` with; the layout is freed at the end.

    A budget that the libraries, or the vocabulary beside them, would exceed is planned with the formulas, so
    that planning itself never exceeds it.
    """
    memory = read_process_memory()
    # A header with many keys makes the process larger before anything is planned.
    preloaded = memory.resident_bytes + (0 if is_loaded() else PRELOAD_BYTES)
    resident = max(estimates.interpreter_bytes(memory), preloaded)
    # Not checked against llama.cpp yet: a budget that only fits with these is checked when it is given.
    is_linux = sys.platform == "linux"
    formulas = ProcessBaseline(
        interpreter_bytes=resident,
        processor=platform.machine(),
        kv_on_demand=is_linux and estimates.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=is_linux,
    )
    formulas = replace(formulas, prompt_tokens=prompt_tokens_of(prompt, spec, budget, None))
    if not spec.path.is_file():
        without_file = replace(formulas, kv_on_demand=False, can_stream_weights=False)
        yield without_file, FormulaSizes(spec)
        return
    if resident > budget.num_bytes:
        yield formulas, FormulaSizes(spec)
        return
    preload()
    template_bytes = _compile_template(spec, budget)
    formulas = replace(formulas, template_bytes=template_bytes)
    before = read_process_memory().resident_bytes
    model_bytes = estimates.vocabulary_bytes(spec.vocabulary) + estimates.structure_bytes(spec)
    shortest = layout_bytes(spec, SHORTEST_LAYOUT)
    if before + model_bytes + max(estimates.loading_bytes(spec), shortest) > budget.num_bytes:
        yield replace(formulas, interpreter_bytes=before), FormulaSizes(spec)
        return
    try:
        install_guarded_tokenizer()  # planning counts the tokens of a prompt
        with guarded_aborts():
            simulated = SimulatedGguf(spec)
            simulated.hold(SHORTEST_LAYOUT, 1, "f16")
    except ModelError:
        measured = process_baseline(spec, before, vocabulary=False)
        measured = replace(
            measured, template_bytes=template_bytes, prompt_tokens=formulas.prompt_tokens
        )
        yield measured, FormulaSizes(spec)
        return
    measured = replace(process_baseline(spec, before), template_bytes=template_bytes)
    simulated.release()
    try:
        require_decoder(spec, simulated.kind)
    except ModelError:
        simulated.close()
        raise
    prompt_tokens = prompt_tokens_of(prompt, spec, budget, simulated.tokenizer)
    measured = replace(measured, prompt_tokens=prompt_tokens)
    trim_heap()
    room_bytes = budget.num_bytes - read_process_memory().resident_bytes
    sizes = SimulatedSizes(spec, simulated, room_bytes)
    try:
        yield measured, sizes
    finally:
        sizes.close()


def process_baseline(
    spec: ModelSpec, before_bytes: int, *, vocabulary: bool = True
) -> ProcessBaseline:
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


def preload() -> None:
    """Import libraries and fault in the code pages that the first answer runs."""
    modules = [importlib.import_module(name) for name in PRELOADED_MODULES]
    if read_process_memory().resident_bytes < estimates.INTERPRETER_BYTES:  # no host program
        release_startup_pages()
    fault_in(address_of(native_library().lowtide_native_version))
    fault_in(llama_library().address("ggml_get_type_traits_cpu"))
    for module in modules:  # after the pages that the imports read were released
        getattr(module, "preload", lambda: None)()
    hashlib.sha256(bytes(1024)).digest()  # saving a session computes such a digest


def _compile_template(spec: ModelSpec, budget: Budget) -> int | None:
    """Compile the chat template, as the first answer will; return what that takes for a moment.

    None where the budget might not hold it. jinja's code is in memory afterwards.
    """
    before = read_process_memory().resident_bytes
    if before + estimates.template_bytes(spec) > budget.num_bytes:
        return None
    template = None
    with contextlib.suppress(TemplateError):
        template = ChatTemplate(spec.chat_template or LONGEST_TEMPLATE, {})
    grown_bytes = max(read_process_memory().resident_bytes - before, 0)
    del template
    return grown_bytes + grown_bytes // TEMPLATE_PEAK_SHARE
