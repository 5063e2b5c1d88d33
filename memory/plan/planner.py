"""The planner: from a model, a request and a budget to a `MemoryPlan`, by arithmetic alone.

If not everything fits, the planner reduces in this order, starting with what does not change any answer:
speculation; the prefix cache; the cached filter prefill; the batch size of a prefill; the context, if the
user did not set it; resident weights (they are streamed instead); the type of the KV cache; the planned size
of the KV cache, if the user set the context. If that is not enough, the plan does not fit. The planner never
shortens a context that the user set, and never drops a draft model that the user named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lowtide.memory.budget import WATCHED_SHARE, Budget
from lowtide.memory.plan.estimates import (
    KV_PADDING,
    ContextSizes,
    FormulaSizes,
    supports_kv_type,
)
from lowtide.memory.plan.gpu import require_gpu_fit
from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.lines import PlanLines
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.units import OverBudget, format_bytes_up
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

MIN_CONTEXT = 512
"""The shortest context that the planner chooses by itself, in tokens."""
BATCH_SIZES = (128, 64, 32)
"""Tokens per prefill batch. More than 128 measured no faster, and Ctrl-C would have to wait longer."""


def plan_memory(
    spec: ModelSpec,
    options: PlanRequest,
    budget: Budget,
    baseline: ProcessBaseline,
    sizes: ContextSizes | None = None,
) -> MemoryPlan:
    """Return the best plan within the budget, or the smallest plan if none fits (`fits` is False then).

    `sizes` gives the sizes of a context; None uses the formulas of `estimates`. Raises `BadOption` if the
    model does not support an option.
    """
    _check(spec, options)
    planner = _Planner(spec, options, budget.num_bytes, baseline, sizes or FormulaSizes(spec))
    smallest = planner.smallest()
    chosen = planner.best() or smallest
    return MemoryPlan(
        budget=budget,
        rows=planner.lines.of(chosen),
        lower_bound_bytes=planner.lines.total_bytes(smallest) + baseline.tolerance_bytes,
        context=chosen.context,
        batch_size=chosen.batch_size,
        kv_type=chosen.kv_type,
        kv_tokens=chosen.kv_tokens,
        cache_tokens=planner.lines.cache_tokens(chosen),
        cache_filter_pass=chosen.cache_filter_pass,
        memory_map=planner.lines.memory_map(chosen),
        resident_layers=chosen.resident_layers,
        downgrades=chosen.downgrades_from(planner.preferred()),
        gpus=planner.lines.gpus(chosen),
        verify_batch=chosen.verify_batch,
    )


def require_fit(
    plan: MemoryPlan,
    spec: ModelSpec,
    options: PlanRequest,
    baseline: ProcessBaseline,
    sizes: ContextSizes | None = None,
) -> None:
    """Raise `OverBudget`, with the lower bound and what to change, if the plan does not fit."""
    if plan.fits:
        return
    require_gpu_fit(plan.gpus, spec, options.gpu)
    hint = f"raise {option('memory')} to {format_bytes_up(plan.lower_bound_bytes).replace(' ', '')}"
    if options.context is not None and options.context > MIN_CONTEXT:
        any_context = replace(options, context=None)
        planner = _Planner(
            spec, any_context, plan.budget.num_bytes, baseline, sizes or FormulaSizes(spec)
        )
        shorter = planner.best()
        if shorter is not None:
            hint += f", shorten {option('context')} to {shorter.context}"
    raise OverBudget(
        f"{spec.name} with a context of {plan.context} tokens",
        plan.lower_bound_bytes,
        plan.budget.num_bytes,
        f"{hint}, or pick a smaller model",
    )


def _check(spec: ModelSpec, options: PlanRequest) -> None:
    if options.context is not None and options.context > spec.context_length:
        raise BadOption(
            f"{option('context')} is {options.context} tokens, but {spec.name} was trained for {spec.context_length}: "
            f"ask for {spec.context_length} or less"
        )
    if options.kv_type is not None and options.kv_type not in spec.kv_types:
        raise BadOption(
            f"{option('kv_type')} is {options.kv_type!r}, but {spec.name} has a KV cache of "
            f"{', '.join(spec.kv_types)}: leave kv_type out"
        )
    if options.kv_type is not None and not supports_kv_type(spec, options.kv_type):
        raise BadOption(
            f"{option('kv_type')} is {options.kv_type!r}, which needs a head_dim that is a multiple of 32, but "
            f"{spec.name} has a head_dim of {spec.key_head_dim}: use f16"
        )


class _Planner:
    """Searches the candidates of one model for the best one within a budget."""

    def __init__(
        self,
        spec: ModelSpec,
        options: PlanRequest,
        budget_bytes: int,
        baseline: ProcessBaseline,
        sizes: ContextSizes,
    ) -> None:
        self._spec = spec
        self._options = options
        self._budget_bytes = budget_bytes
        self._baseline = baseline
        self.lines = PlanLines(spec, options, baseline, sizes)
        self._batch_sizes = BATCH_SIZES if options.batch_size is None else (options.batch_size,)
        # Weights on a GPU are not streamed from the file.
        self._can_stream = (
            baseline.can_stream_weights and bool(spec.weight_groups) and not options.gpu
        )

    def preferred(self) -> PlanCandidate:
        """Return the candidate for unlimited memory."""
        context = self._options.context or self._spec.context_length
        candidate = self._candidate(context, self._kv_types[0])
        return replace(
            candidate,
            prefix_bytes=self._options.prefix_bytes,
            cache_filter_pass=self._options.filter_prefill is not None,
            verify_batch=max(self._verify_batches, default=0),
        )

    def best(self) -> PlanCandidate | None:
        """Return the best candidate that fits, None if none does.

        Caches and speculation get only what the rest leaves below the level at which the watchdog would
        release them at once.
        """
        found = self._best_without_caches()
        if found is None:
            return None
        watched_bytes = int(self._budget_bytes * WATCHED_SHARE)
        if self._options.filter_prefill is not None:
            caching = replace(found, cache_filter_pass=True)
            found = caching if self.lines.total_bytes(caching) <= watched_bytes else found
        left_bytes = watched_bytes - self.lines.total_bytes(found)
        found = replace(found, prefix_bytes=min(self._options.prefix_bytes, max(left_bytes, 0)))
        return self._with_speculation(found, watched_bytes)

    def _with_speculation(self, found: PlanCandidate, limit_bytes: int) -> PlanCandidate:
        """Return the candidate with the largest verify batch that fits into `limit_bytes`."""
        candidates = (replace(found, verify_batch=size) for size in self._verify_batches)
        return next((c for c in candidates if self.lines.total_bytes(c) <= limit_bytes), found)

    def _best_without_caches(self) -> PlanCandidate | None:
        """Return the first candidate that fits, with as many resident layers as fit; None if none does."""
        found = next(filter(self._fits, self._from_best_to_smallest()), None)
        if found is None or found.resident_layers is None:
            return found
        # A pass that streams weights costs the same for any number of tokens. So speculation gains more
        # than a resident layer does, and gets its memory first.
        found = self._with_speculation(found, self._budget_bytes)
        return self._longest(
            lambda layers: replace(found, resident_layers=layers), 0, self._spec.num_layers
        )

    def smallest(self) -> PlanCandidate:
        """Return the candidate that needs the fewest bytes."""
        context = self._options.context or min(MIN_CONTEXT, self._spec.context_length)
        kv_tokens = min(context, MIN_CONTEXT) if self._baseline.kv_on_demand else context
        candidates = [
            self._small(context, kv_type, resident_layers=layers, kv_tokens=kv_tokens)
            for kv_type in self._kv_types
            for layers in self._resident_layers
        ]
        return min(
            candidates, key=lambda c: (self._bytes_beyond_gpus(c), self.lines.total_bytes(c))
        )

    def _from_best_to_smallest(self) -> Iterator[PlanCandidate]:
        requested = self._options.context
        for kv_type in self._kv_types:
            for layers in self._resident_layers:
                if layers is None:
                    for batch_size in self._batch_sizes:
                        context = requested or self._spec.context_length
                        yield self._candidate(context, kv_type, batch_size)
                if requested is not None:
                    yield self._small(requested, kv_type, resident_layers=layers)
                else:
                    yield from self._longest_context(kv_type, layers)
        if requested is not None and self._baseline.kv_on_demand:
            for kv_type in self._kv_types:
                yield from self._largest_cache(requested, kv_type)

    def _longest_context(
        self, kv_type: str, resident_layers: int | None
    ) -> Iterator[PlanCandidate]:
        """Yield the longest context that fits, in steps of the cache's padding, if any does."""
        limit = self._spec.context_length
        found = self._longest(
            lambda steps: self._small(
                min(max(steps * KV_PADDING, MIN_CONTEXT), limit),
                kv_type,
                resident_layers=resident_layers,
            ),
            MIN_CONTEXT // KV_PADDING,
            -(-limit // KV_PADDING),
        )
        if found is not None:
            yield found

    def _largest_cache(self, context: int, kv_type: str) -> Iterator[PlanCandidate]:
        """Yield the requested context with the largest planned KV cache that fits, if any does."""
        layers = self._resident_layers[-1]
        found = self._longest(
            lambda steps: self._small(
                context, kv_type, resident_layers=layers, kv_tokens=min(steps * KV_PADDING, context)
            ),
            MIN_CONTEXT // KV_PADDING,
            -(-context // KV_PADDING),
        )
        if found is not None:
            yield found

    def _longest(
        self, candidate_of: Callable[[int], PlanCandidate], least: int, most: int
    ) -> PlanCandidate | None:
        """Return the candidate of the largest number from `least` to `most` that fits, by bisection."""
        if not self._fits(candidate_of(least)):
            return None
        low, high = least, max(most, least) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(candidate_of(middle)):
                low = middle
            else:
                high = middle
        return candidate_of(low)

    def _fits(self, candidate: PlanCandidate) -> bool:
        fits_process = self.lines.total_bytes(candidate) <= self._budget_bytes
        return fits_process and not self._bytes_beyond_gpus(candidate)

    def _bytes_beyond_gpus(self, candidate: PlanCandidate) -> int:
        """Return by how many bytes the requested layers exceed the budgets of their GPUs."""
        gpus = self.lines.gpus(candidate)
        return sum(max(gpu.total_bytes - gpu.budget_bytes, 0) for gpu in gpus)

    def _candidate(
        self, context: int, kv_type: str, batch_size: int | None = None
    ) -> PlanCandidate:
        config = self._options.speculation
        # A draft model is part of the request: it is never dropped, only verified in smaller batches.
        smallest_verify = min(self._verify_batches) if config and config.draft_model else 0
        return PlanCandidate(
            context=context,
            batch_size=batch_size or self._batch_sizes[0],
            kv_type=kv_type,
            kv_tokens=context,
            verify_batch=smallest_verify,
        )

    def _small(
        self,
        context: int,
        kv_type: str,
        *,
        resident_layers: int | None,
        kv_tokens: int | None = None,
    ) -> PlanCandidate:
        """Return a candidate with the smallest batch size."""
        candidate = self._candidate(context, kv_type, self._batch_sizes[-1])
        return replace(
            candidate,
            resident_layers=resident_layers,
            kv_tokens=kv_tokens if kv_tokens else context,
        )

    @property
    def _verify_batches(self) -> tuple[int, ...]:
        """Sizes of a verification, largest first; empty without speculation."""
        config = self._options.speculation
        return config.verify_batches() if config is not None else ()

    @property
    def _resident_layers(self) -> tuple[int | None, ...]:
        """All weights resident (None) and, if weights can be streamed, no layer resident (0)."""
        return (None, 0) if self._can_stream else (None,)

    @property
    def _kv_types(self) -> tuple[str, ...]:
        if self._options.kv_type is not None:
            return (self._options.kv_type,)
        return tuple(kind for kind in self._spec.kv_types if supports_kv_type(self._spec, kind))
