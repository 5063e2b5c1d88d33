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
from functools import partial

from lowtide.attention.bindings.library import can_map_lazily, native_library
from lowtide.memory.budget import Budget
from lowtide.memory.os.kv_pages import can_use_demand_zero
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.os.shared_libraries import address_of, fault_in, release_startup_pages
from lowtide.memory.plan import estimates
from lowtide.memory.plan.estimates import FormulaSizes
from lowtide.memory.plan.plan import ProcessBaseline
from lowtide.memory.process import ProcessMemory, read_process_memory
from lowtide.memory.units import KIB, MIB
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import ModelError, TemplateError
from lowtide.models.gguf.llama_cpp import is_loaded, llama_library
from lowtide.models.kind import require_decoder
from lowtide.models.spec import ModelSpec
from lowtide.models.template.families import LONGEST_TEMPLATE
from lowtide.runtime.backends.backend import Measurement, PlannedPrompt, prompt_tokens_of
from lowtide.runtime.backends.kernels.layouts import (
    SHORTEST_LAYOUT,
    Layouts,
    SimulatedSizes,
    layout_bytes,
)

MODULE_BYTES = {
    "lowtide.runtime.generation.sampling": 12 * MIB,
    "lowtide.runtime.runtime": 2 * MIB + 512 * KIB,
}
"""The modules that an answer needs, and what each takes beside those before it: 11.3 MiB (numpy) and 1.9 measured.

They are imported before memory is measured, and their `preload()` runs, so that the measured size includes the code
pages of the first answer. A sampling option that uses new numpy functions must use them in `preload()` too. The names
are text because these modules import this one.
"""
LIBRARY_BYTES = 5 * MIB + 512 * KIB
"""What the native libraries take when all of their code is resident, and sampling: 5.4 MiB measured."""
TEMPLATE_LIBRARY_BYTES = 3 * MIB + 512 * KIB
"""What jinja takes before it compiles a template: 3.2 MiB measured."""
TEMPLATE_PEAK_SHARE = 4
"""Compiling a template takes at its peak a quarter more than what is resident right afterwards."""
TOLERANCE_BYTES = MIB
"""How much the measured size may differ between two runs of a command: 0.1 MiB was observed."""


@contextlib.contextmanager
def measured_baseline(
    spec: ModelSpec, budget: Budget, prompt: PlannedPrompt | None = None
) -> Iterator[Measurement]:
    """Yield the baseline and the context sizes to plan `spec` with; the layout is freed at the end.

    A budget that the libraries, or the vocabulary beside them, would exceed is planned with the formulas, so
    that planning itself never exceeds it.
    """
    memory = read_process_memory()
    is_fresh = _is_fresh(memory)
    # A header with many keys, and a long prompt, make the process larger before anything is planned.
    preloaded = memory.resident_bytes + _bytes_to_preload()
    interpreter = estimates.interpreter_bytes(memory)
    is_text = prompt is not None and not prompt.is_chat
    template_library_bytes = 0 if is_text else TEMPLATE_LIBRARY_BYTES
    # Not checked against llama.cpp yet: a budget that only fits with these is checked when it is given.
    is_linux = sys.platform == "linux"
    formulas = ProcessBaseline(
        interpreter_bytes=max(interpreter, preloaded + template_library_bytes),
        processor=platform.machine(),
        tolerance_bytes=TOLERANCE_BYTES,
        kv_on_demand=is_linux and estimates.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=is_linux,
    )
    estimated_tokens = partial(prompt_tokens_of, prompt, spec, budget, None)
    if not spec.path.is_file():
        without_file = replace(formulas, kv_on_demand=False, can_stream_weights=False)
        yield Measurement(without_file, FormulaSizes(spec), estimated_tokens)
        return
    if max(interpreter, preloaded) > budget.num_bytes:
        yield Measurement(formulas, FormulaSizes(spec), estimated_tokens)
        return
    preload()
    with_templates = read_process_memory().resident_bytes + template_library_bytes
    if with_templates > budget.num_bytes:
        formulas = replace(formulas, interpreter_bytes=with_templates)
        yield Measurement(formulas, FormulaSizes(spec), estimated_tokens)
        return
    template_bytes = 0 if is_text else _compile_template(spec, budget)
    formulas = replace(formulas, template_bytes=template_bytes)
    before = _trimmed_bytes()
    model_bytes = estimates.described_bytes(spec)
    shortest = layout_bytes(spec, SHORTEST_LAYOUT)
    if before + model_bytes + max(estimates.loading_bytes(spec), shortest) > budget.num_bytes:
        formulas = replace(formulas, interpreter_bytes=before)
        yield Measurement(formulas, FormulaSizes(spec), estimated_tokens)
        return
    layouts = Layouts(spec, after_template=not is_text and template_bytes is not None)
    try:
        laid_out = layouts.measured(before, is_fresh=is_fresh)
    except ModelError:
        layouts.close()
        measured = replace(process_baseline(spec, before, None), template_bytes=template_bytes)
        yield Measurement(measured, FormulaSizes(spec), estimated_tokens)
        return
    try:
        require_decoder(spec, laid_out.kind)
        measured = process_baseline(spec, before, laid_out.vocabulary_bytes)
        measured = replace(
            measured, template_bytes=template_bytes, header_loading_bytes=laid_out.loading_bytes
        )
        if spec.header_array_bytes > model_bytes:
            # Reading such arrays again takes more: the heap keeps a part of what the first reading freed.
            measured = replace(measured, vocabulary_bytes=None, header_loading_bytes=None)
        resident = _trimmed_bytes() - layouts.resident_bytes
        room_bytes = budget.num_bytes - resident - laid_out.vocabulary_bytes
        sizes = SimulatedSizes(spec, layouts, room_bytes)
        count = partial(prompt_tokens_of, prompt, spec, budget, layouts.tokenizer)
        yield Measurement(measured, sizes, count)
    finally:
        layouts.close()


def _trimmed_bytes() -> int:
    """Return the resident bytes without free pages of the heap: they count where something takes them again."""
    trim_heap()
    return read_process_memory().resident_bytes


def _is_fresh(memory: ProcessMemory) -> bool:
    """Whether the process is small and has not loaded llama.cpp yet, so that its heap has no room of old."""
    return not is_loaded() and memory.resident_bytes < estimates.INTERPRETER_BYTES


def process_baseline(
    spec: ModelSpec, before_bytes: int, vocabulary_bytes: int | None
) -> ProcessBaseline:
    """Return the baseline of a process of `before_bytes`; `vocabulary_bytes` None leaves those to the formula."""
    return ProcessBaseline(
        interpreter_bytes=before_bytes,
        processor=platform.machine(),
        kv_on_demand=can_use_demand_zero() and estimates.kv_token_bytes(spec, "f16") is not None,
        can_stream_weights=can_map_lazily(),
        repacks=llama_library().repacks,
        vocabulary_bytes=vocabulary_bytes,
        tolerance_bytes=TOLERANCE_BYTES,
    )


def _bytes_to_preload() -> int:
    """Return what `preload` will add to the process, at most; commands import different parts before they plan."""
    modules_bytes = sum(size for name, size in MODULE_BYTES.items() if name not in sys.modules)
    return modules_bytes + (0 if is_loaded() else LIBRARY_BYTES)


def preload() -> None:
    """Import libraries and fault in the code pages that the first answer runs."""
    modules = [importlib.import_module(name) for name in MODULE_BYTES]
    if read_process_memory().resident_bytes < estimates.INTERPRETER_BYTES:  # no host program
        release_startup_pages()
    fault_in(address_of(native_library().lowtide_native_version))
    fault_in(*llama_library().processor_code())
    for module in modules:  # after the pages that the imports read were released
        getattr(module, "preload", lambda: None)()
    hashlib.sha256(bytes(1024)).digest()  # saving a session computes such a digest


def _compile_template(spec: ModelSpec, budget: Budget) -> int | None:
    """Compile the chat template, as the first answer will; return what that takes for a moment.

    None where the budget might not hold it.
    """
    ChatTemplate("", {})  # jinja's code is in memory afterwards
    before = read_process_memory().resident_bytes
    if before + estimates.template_bytes(spec) > budget.num_bytes:
        return None
    template = None
    with contextlib.suppress(TemplateError):
        template = ChatTemplate(spec.chat_template or LONGEST_TEMPLATE, {})
    grown_bytes = max(read_process_memory().resident_bytes - before, 0)
    del template
    return grown_bytes + grown_bytes // TEMPLATE_PEAK_SHARE
