"""Compares lowtide's kernels with llama.cpp's at a model's shapes, once for each model, machine and version.

It takes some milliseconds before the model is loaded: single nodes of a graph of ggml's own, on one thread, with zeros
for weights. Where lowtide's are slower, or this llama.cpp cannot be hooked, llama.cpp's own run. What was measured
is stored in the folder of the calibrations, beside the costs of passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowtide.attention.bindings.ggml_graph import WEIGHTS_NAME, GgmlGraph
from lowtide.attention.bindings.library import cpu_features, native_version
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.bindings.matmul import can_repack
from lowtide.attention.calibration import CalibrationError, find_file, write_values
from lowtide.memory.budget import Budget
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import MIB
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.repacked import REPACKABLE_TYPES
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.kernels.kernel_choice import KernelChoice

TOKENS = (1, 32)
"""Tokens of a pass that are compared: decoding, and a part of a prompt."""
NUM_KEYS = 512
MATRIX_VALUES = 1 << 20
"""The size of a matrix that is multiplied: enough to hide what starting a graph takes."""
ROW_STEP = 64
"""Its rows are a multiple of this, as both layouts need."""
MOST_BYTES = 16 * MIB
"""What the comparison takes for a moment, at most."""
ROUNDS = 5
MOST_ROUNDS = 25
"""Where lowtide's kernels seem to be slower, it is timed again up to so often: another process may have the core."""
COMPARISON = 2
"""Counted up when the comparison changes, so that it is made again."""
NOT_SLOWER = 1.05
"""Kernels are as fast as others if they take at most this multiple of their time: two equal ones differ by as much."""


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Seconds of lowtide's kernels and of llama.cpp's, by what they compute, such as "matmul Q4_0, 32 tokens"."""

    seconds: dict[str, tuple[float, float]]
    unhooked_reason: str | None = None

    def slower(self, kind: str) -> str | None:
        """Return in words where lowtide's kernels of this kind are slower; None where they are not."""
        own, others = (
            sum(times[i] for name, times in self.seconds.items() if name.startswith(kind))
            for i in (0, 1)
        )
        if own <= NOT_SLOWER * others:
            return None
        if math.isinf(own):
            return f"lowtide's {kind} does not know the shapes of this model"
        return f"lowtide's {kind} takes {own / others:.2f} times as long as llama.cpp's here"

    def apply(self, choice: KernelChoice) -> KernelChoice:
        """Return the choice without the kernels that are slower or cannot run."""
        if self.unhooked_reason is not None:
            return choice.without(attention=True, repack=True, reason=self.unhooked_reason)
        reasons = {kind: self.slower(kind) for kind in ("attention", "matmul")}
        if choice.attention and (reason := reasons["attention"]) is not None:
            choice = choice.without(attention=True, reason=reason)
        if choice.repack and (reason := reasons["matmul"]) is not None:
            choice = choice.without(repack=True, reason=reason)
        return choice


def measured_choice(spec: ModelSpec, choice: KernelChoice, budget: Budget) -> KernelChoice:
    """Return `choice` without the kernels that are slower on this machine; measure where that is unknown.

    Where the budget has no room to measure, they count as not slower.
    """
    if not (choice.attention or choice.repack):
        return choice
    library = llama_library()
    parts = (
        COMPARISON, spec.fingerprint, sorted(spec.tensor_types), platform.node(), platform.machine(), cpu_features(),
        native_version(), library.version, library.variant, library.file.path,
    )  # fmt: skip
    key = " ".join(map(str, parts))
    name = f"kernel-times-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    times = _read(name)
    if times is None:
        if read_process_memory().resident_bytes + MOST_BYTES > budget.num_bytes:
            return choice
        times = measure(spec)
        if (earlier := _read(name)) is not None:  # of a process that measured at the same time
            return earlier.apply(choice)
        values = {"of": key, "seconds": times.seconds, "unhooked_reason": times.unhooked_reason}
        with contextlib.suppress(CalibrationError):  # the folder may not be writable
            write_values(name, values)
    return times.apply(choice)


def measure(spec: ModelSpec) -> KernelTimes:
    """Compare the kernels at the shapes of a model."""
    try:
        hook = LlamaHook(threads=1)
    except LowtideError as error:
        return KernelTimes({}, unhooked_reason=str(error))
    with closing(hook):
        seconds = dict(_compared(spec, hook))
    trim_heap()
    return KernelTimes(seconds)


def _compared(spec: ModelSpec, hook: LlamaHook) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield what was compared, with the times of both: decoding is one token, a part of a prompt are 32."""
    shapes = dict(_matrices(spec))
    heads = (spec.num_heads, max(spec.num_kv_heads), spec.key_head_dim)
    has_heads = min(heads) > 0 and spec.num_heads % heads[1] == 0
    most_columns = max((n for _, n in shapes.values()), default=1)
    for tokens in TOKENS:
        for kind, shape in shapes.items():
            make = partial(GgmlGraph.matmul, kind, *shape, tokens)
            # The hook knows weights by their addresses, and these may be those of an earlier graph's other tensors.
            hook.read_repacked((WEIGHTS_NAME,), max(TOKENS), most_columns)
            yield f"matmul {kind}, {tokens} tokens", _both(make, hook)
        if has_heads:
            make = partial(GgmlGraph.attention, *heads, NUM_KEYS, tokens)
            yield f"attention, {tokens} tokens", _both(make, hook)


def _matrices(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield rows and columns of a matrix of each type that can be repacked, with the columns of one in the model."""
    widths = (spec.embedding_width, *dict.fromkeys(spec.feed_forward_width))
    for kind in sorted(spec.tensor_types & REPACKABLE_TYPES):
        for num_columns in widths:
            num_rows = max(MATRIX_VALUES // max(num_columns, 1) // ROW_STEP, 1) * ROW_STEP
            if num_columns and can_repack(kind, num_rows, num_columns):
                yield kind, (num_rows, num_columns)
                break


def _both(make: Callable[[], GgmlGraph], hook: LlamaHook) -> tuple[float, float]:
    """Return the shortest time of lowtide's kernel and of llama.cpp's; inf for one that does not know the node."""
    with ExitStack() as graphs:
        own, others = (graphs.enter_context(closing(make())) for _ in range(2))
        is_known = own.run_in(hook)
        others.let_llama_repack()
        own_s = others_s = math.inf
        for i in range(MOST_ROUNDS):
            if i >= ROUNDS and own_s <= NOT_SLOWER * others_s:
                break
            own_s, others_s = min(own_s, own.seconds()), min(others_s, others.seconds())
    return own_s if is_known else math.inf, others_s


def _read(name: str) -> KernelTimes | None:
    """Return what was measured earlier; None where nothing was, or the file is damaged."""
    path = find_file(name)
    if path is None:
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        reason = values["unhooked_reason"]
        seconds = {
            str(key): (float(own), float(others))
            for key, (own, others) in values["seconds"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if not isinstance(reason, str | None) or any(min(times) <= 0 for times in seconds.values()):
        return None
    return KernelTimes(seconds, reason)
