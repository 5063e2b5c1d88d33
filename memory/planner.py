"""The planner: from a model, a wish and a budget to a plan, by arithmetic alone.

Reads nothing and allocates nothing; knows no tokens. When it is tight it gives up in this order:
rows of a prefill pass, then (for a stated context) the KV cache's type, or (for an open one) the
context, and last it refuses. A stated context is never shortened, and a type never lowered where a
shorter context would do: the first would be another request, the second another answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from lowtide.memory import footprint
from lowtide.memory.budget import Budget
from lowtide.memory.errors import OverBudget
from lowtide.memory.footprint import CELL_STEP
from lowtide.memory.plan import KV_TYPES, Host, MemoryPlan, PlanOptions, PlanRow
from lowtide.memory.units import format_bytes_up
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

MIN_CONTEXT = 512
ROW_CHOICES = (128, 64, 32)
"""Rows of a prefill pass. More than 128 measured no faster and keeps Ctrl-C waiting longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    context: int
    max_rows: int
    kv_type: str


def plan_memory(spec: ModelSpec, options: PlanOptions, budget: Budget, host: Host) -> MemoryPlan:
    """Return the best plan inside the budget, or the smallest one where none fits (`fits` is False).

    Raises `BadOption` where the options ask of the model what it does not have.
    """
    _check(spec, options)
    preferred = next(_choices(spec, options, host, budget.num_bytes))
    smallest = _smallest(spec, options, host)
    chosen = next(
        (
            choice
            for choice in _choices(spec, options, host, budget.num_bytes)
            if _total(spec, choice, options, host) <= budget.num_bytes
        ),
        smallest,
    )
    return MemoryPlan(
        budget=budget,
        rows=_rows(spec, chosen, options, host),
        lower_bound_bytes=_total(spec, smallest, options, host),
        context=chosen.context,
        max_rows=chosen.max_rows,
        kv_type=chosen.kv_type,
        memory_map=_memory_map(spec, host),
        gave_up=_given_up(preferred, chosen),
    )


def require_fit(plan: MemoryPlan, spec: ModelSpec, options: PlanOptions, host: Host) -> None:
    """Raise `OverBudget`, with the lower bound and what to change, where the plan does not fit."""
    if plan.fits:
        return
    hint = f"raise --memory to {format_bytes_up(plan.lower_bound_bytes).replace(' ', '')}"
    if options.context is not None and options.context > MIN_CONTEXT:
        shorter = _longest_context(spec, options, host, plan.budget.num_bytes)
        if shorter is not None:
            hint += f", shorten --context to {shorter}"
    raise OverBudget(
        f"{spec.name} with a context of {plan.context} tokens",
        plan.lower_bound_bytes,
        plan.budget.num_bytes,
        f"{hint}, or pick a smaller model",
    )


def _check(spec: ModelSpec, options: PlanOptions) -> None:
    if options.context is not None and options.context > spec.context_length:
        raise BadOption(
            f"context is {options.context} tokens, {spec.name} was made for {spec.context_length}: "
            f"ask for {spec.context_length} or less"
        )
    if options.kv_type is not None and not footprint.supports_kv_type(spec, options.kv_type):
        raise BadOption(
            f"kv_type is {options.kv_type!r}, which needs heads of a multiple of 32; {spec.name} "
            f"has {spec.key_head_size}: use f16"
        )


def _choices(
    spec: ModelSpec, options: PlanOptions, host: Host, budget_bytes: int
) -> Iterator[_Choice]:
    """Yield the choices from the best to the smallest."""
    kv_types = _kv_types(spec, options)
    rows = _row_choices(options)
    if options.context is not None:
        for kv_type in kv_types:
            for max_rows in rows:
                yield _Choice(context=options.context, max_rows=max_rows, kv_type=kv_type)
        return
    for max_rows in rows:
        yield _Choice(context=spec.context_length, max_rows=max_rows, kv_type=kv_types[0])
    for kv_type in kv_types:
        fixed = replace(options, kv_type=kv_type, max_rows=rows[-1])
        context = _longest_context(spec, fixed, host, budget_bytes)
        if context is not None:
            yield _Choice(context=context, max_rows=rows[-1], kv_type=kv_type)


def _smallest(spec: ModelSpec, options: PlanOptions, host: Host) -> _Choice:
    choices = [
        _Choice(
            context=options.context or min(MIN_CONTEXT, spec.context_length),
            max_rows=_row_choices(options)[-1],
            kv_type=kv_type,
        )
        for kv_type in _kv_types(spec, options)
    ]
    return min(choices, key=lambda choice: _total(spec, choice, options, host))


def _row_choices(options: PlanOptions) -> tuple[int, ...]:
    return ROW_CHOICES if options.max_rows is None else (options.max_rows,)


def _kv_types(spec: ModelSpec, options: PlanOptions) -> tuple[str, ...]:
    if options.kv_type is not None:
        return (options.kv_type,)
    return tuple(kind for kind in KV_TYPES if footprint.supports_kv_type(spec, kind))


def _longest_context(
    spec: ModelSpec, options: PlanOptions, host: Host, budget_bytes: int
) -> int | None:
    """Return the longest context that fits with the smallest rows, in whole steps of the cache."""
    kv_type, max_rows = _kv_types(spec, options)[-1], _row_choices(options)[-1]

    def fits(context: int) -> bool:
        choice = _Choice(context=context, max_rows=max_rows, kv_type=kv_type)
        return _total(spec, choice, options, host) <= budget_bytes

    low = min(MIN_CONTEXT, spec.context_length)
    if not fits(low):
        return None
    if fits(spec.context_length):
        return spec.context_length
    low_steps, high_steps = low // CELL_STEP, -(-spec.context_length // CELL_STEP)
    while high_steps - low_steps > 1:
        middle = (low_steps + high_steps) // 2
        if fits(middle * CELL_STEP):
            low_steps = middle
        else:
            high_steps = middle
    return max(low_steps * CELL_STEP, low)


def _memory_map(spec: ModelSpec, host: Host) -> bool:
    return not footprint.is_repacked(spec, host.processor)


def _total(spec: ModelSpec, choice: _Choice, options: PlanOptions, host: Host) -> int:
    return sum(row.num_bytes for row in _rows(spec, choice, options, host))


def _rows(
    spec: ModelSpec, choice: _Choice, options: PlanOptions, host: Host
) -> tuple[PlanRow, ...]:
    context, max_rows, kv_type = choice.context, choice.max_rows, choice.kv_type
    memory_map = _memory_map(spec, host)
    kv = footprint.kv_bytes(spec, context, kv_type)
    compute = footprint.compute_bytes(spec, context, max_rows, kv_type)
    logits = footprint.logits_bytes(spec)
    prompt = footprint.prompt_bytes(context)
    threads = options.attention_threads
    attention = footprint.attention_bytes(spec, context, threads) if threads else 0
    if options.selection_layers:
        attention += footprint.selection_bytes(spec, context, options.selection_layers)
    after_loading = kv + compute + logits + prompt + attention
    loading = max(footprint.loading_bytes(spec) - after_loading, 0)
    vocabulary = spec.vocabulary.num_tokens
    return (
        PlanRow("interpreter and libraries", host.interpreter_bytes, "Python, numpy, llama.cpp"),
        PlanRow(
            "vocabulary", footprint.vocabulary_bytes(spec.vocabulary), f"{vocabulary:,} tokens"
        ),
        PlanRow(
            "weights",
            footprint.weight_bytes(spec, memory_map=memory_map),
            f"{spec.quantisation}, {'memory-mapped' if memory_map else 'copied and repacked'}",
        ),
        PlanRow("KV cache", kv, f"{context:,} tokens of {kv_type}"),
        PlanRow("compute buffer", compute, f"{max_rows} rows a pass"),
        PlanRow(
            "attention scratch",
            attention,
            f"our kernels, {threads} threads" if threads else "llama.cpp's kernels need none",
        ),
        PlanRow("logits and sampling", logits, "one row of the vocabulary"),
        PlanRow(
            "prompt and tokenising",
            prompt,
            f"{footprint.prompt_limit_bytes(context):,} bytes of text",
        ),
        *_comparison(spec, options.compared_rows),
        PlanRow("loading", loading, "needed for a moment, beyond what follows it"),
        PlanRow("reserve", footprint.RESERVE_BYTES, "allocator slack"),
    )


def _comparison(spec: ModelSpec, num_rows: int) -> tuple[PlanRow, ...]:
    if not num_rows:
        return ()
    num_bytes = footprint.comparison_bytes(spec, num_rows)
    return (PlanRow("comparison", num_bytes, f"{num_rows} distributions over the vocabulary"),)


def _given_up(preferred: _Choice, chosen: _Choice) -> tuple[str, ...]:
    names = {"max_rows": "rows a pass", "kv_type": "KV type", "context": "context"}
    before, after = asdict(preferred), asdict(chosen)
    return tuple(
        f"{name}: {before[key]} to {after[key]}"
        for key, name in names.items()
        if before[key] != after[key]
    )
