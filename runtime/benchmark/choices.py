"""Times the choices that a model leaves open - whose kernels, how many threads - in a few seconds.

Each choice is loaded as a run would load it, inside the same budget, and computes a prompt and some tokens. The paired
benchmark (`paired.py`) measures more exactly: it interleaves the choices and takes minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lowtide.attention.evaluation.divergence import extend
from lowtide.memory.machine import usable_cores
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.kernels.copies import fingerprint_of, read_copies
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_spec

PROMPT_TOKENS = 64
DECODED_TOKENS = 16
CHOICE_S = 1.0
"""A choice is measured until this time is over, but for one prompt and one token."""
ENOUGH_S = 5.0
"""No further choice is measured after this many seconds."""
LEAST_TOKENS = 2
"""The shortest context in which a choice is timed: one token of a prompt, and one that is decoded."""
MOST_COPIED_BYTES = 512 << 20
"""A larger model gets no repacked copy for the comparison alone: writing it would take longer than all the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedChoice:
    """One choice, with tokens a second of a prompt and of decoding; None where it was not measured, for `reason`."""

    kernels: str
    threads: int
    prompt_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def time_choices(spec: ModelSpec, memory: str | int | None) -> list[TimedChoice]:
    """Return the choices with their speeds, those with all threads first; `memory` is the budget of each."""
    started = time.perf_counter()
    timed = []
    for kernels, options, threads in _choices(spec):
        if time.perf_counter() - started > ENOUGH_S:
            reason = f"not measured, because the others took {ENOUGH_S:g} s"
            timed.append(TimedChoice(kernels=kernels, threads=threads, reason=reason))
            continue
        try:
            timed.append(_timed(spec, kernels, threads, {"memory": memory, **options}))
        except LowtideError as error:
            timed.append(TimedChoice(kernels=kernels, threads=threads, reason=str(error)))
    return timed


def _choices(spec: ModelSpec) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield the kernels in words, the options, and the threads."""
    cores = usable_cores()
    kernels = (
        (spec.engine, {"attention": "llama", "repack": False}),
        ("dense", {"attention": "dense", "repack": False}),
        ("dense, repacked", {"attention": "dense", "repack": True}),
    )
    for threads in sorted({cores, max(cores // 2, 1), 1}, reverse=True):
        for name, options in kernels:
            yield name, options, threads


def _timed(spec: ModelSpec, kernels: str, threads: int, options: dict[str, Any]) -> TimedChoice:
    if options["repack"] and spec.file_bytes > MOST_COPIED_BYTES and not _has_copy(spec):
        reason = "the model has no repacked copy yet: `lowtide models repack` makes it"
        return TimedChoice(kernels=kernels, threads=threads, reason=reason)
    context = min(PROMPT_TOKENS + DECODED_TOKENS + 1, spec.context_length)
    if context < LEAST_TOKENS:
        reason = f"the model's context of {context} has no room for a prompt and a decoded token"
        return TimedChoice(kernels=kernels, threads=threads, reason=reason)
    config = LoadConfig(context=context, threads=threads, **options)
    engine = Engine(plan_spec(spec, config))
    try:
        if engine.not_repacked_reason is not None:
            return TimedChoice(kernels=kernels, threads=threads, reason=engine.not_repacked_reason)
        prompt_s, decode_s = _seconds(engine, context)
    finally:
        engine.close()
    num_prompt = max(context - DECODED_TOKENS - 1, 1)
    return TimedChoice(
        kernels=kernels,
        threads=threads,
        prompt_tokens_per_s=num_prompt / prompt_s,
        decode_tokens_per_s=1 / decode_s,
    )


def _has_copy(spec: ModelSpec) -> bool:
    fingerprint = fingerprint_of(spec.paths)
    return any(copy.fingerprint == fingerprint for copy in read_copies())


def _seconds(engine: Engine, context: int) -> tuple[float, float]:
    """Return the seconds of a prompt, the shorter of two where there is time, and the median of a decoded token."""
    model, controller = engine.model, engine.controller
    vocabulary = engine.planned.spec.vocabulary.num_tokens
    token_ids = [i * 7 % min(vocabulary, 251) for i in range(max(context - DECODED_TOKENS - 1, 1))]
    model.forward((0,))  # the first pass allocates
    started = time.perf_counter()
    prompts: list[float] = []
    while not prompts or (len(prompts) < 2 and time.perf_counter() - started < CHOICE_S / 2):
        model.truncate(0)
        before = time.perf_counter()
        extend(model, controller, token_ids)
        prompts.append(time.perf_counter() - before)
    controller.begin_decode()
    decoded: list[float] = []
    while model.num_tokens < context and len(decoded) < DECODED_TOKENS:
        if decoded and time.perf_counter() - started > CHOICE_S:
            break
        before = time.perf_counter()
        model.forward((0,))
        decoded.append(time.perf_counter() - before)
    return min(prompts), statistics.median(decoded)
