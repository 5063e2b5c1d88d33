"""The planner: from a model, a wish and a budget to a plan, by arithmetic alone.

Allocates nothing; knows no tokens. When it is tight it gives up in this order, what keeps answers the same
first: speculation; the prefix cache; a filtered prompt's first pass, kept for another question; rows of
a prefill pass; for an open context, context; resident weights; the KV cache's type; for a stated context,
room in its cache; and last it refuses. A stated context is never shortened: that would be another request.
A draft model that was asked for is part of the request, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lowtide.memory.budget import WATCHED_SHARE, Budget
from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan.estimates import KV_PADDING, ContextSizes, FormulaSizes
from lowtide.memory.plan.gpu import require_gpu_fit
from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.lines import PlanLines
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.units import OverBudget, format_bytes_up
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

MIN_CONTEXT = 512
ROW_CHOICES = (128, 64, 32)
"""Rows of a prefill pass. More than 128 measured no faster and keeps Ctrl-C waiting longer."""


def plan_memory(
    spec: ModelSpec,
    options: PlanRequest,
    budget: Budget,
    baseline: ProcessBaseline,
    sizes: ContextSizes | None = None,
) -> MemoryPlan:
    """Return the best plan inside the budget, or the smallest one where none fits (`fits` is False).

    `sizes` None takes the formulas. Raises `BadOption` where the options ask of the model what it does
    not have.
    """
    _check(spec, options)
    planner = _Planner(spec, options, budget.num_bytes, baseline, sizes or FormulaSizes(spec))
    smallest = planner.smallest()
    chosen = planner.best() or smallest
    return MemoryPlan(
        budget=budget,
        rows=planner.rows.of(chosen),
        lower_bound_bytes=planner.rows.total_bytes(smallest) + baseline.tolerance_bytes,
        context=chosen.context,
        batch_size=chosen.batch_size,
        kv_type=chosen.kv_type,
        kv_tokens=chosen.kv_tokens,
        cache_tokens=planner.rows.cache_tokens(chosen),
        cache_filter_pass=chosen.cache_filter_pass,
        memory_map=planner.rows.memory_map(chosen),
        resident_layers=chosen.resident_layers,
        downgrades=chosen.downgrades_from(planner.preferred()),
        gpus=planner.rows.gpus(chosen),
        verify_batch=chosen.verify_batch,
    )


def require_fit(
    plan: MemoryPlan,
    spec: ModelSpec,
    options: PlanRequest,
    baseline: ProcessBaseline,
    sizes: ContextSizes | None = None,
) -> None:
    """Raise `OverBudget`, with the lower bound and what to change, where the plan does not fit."""
    if plan.fits:
        return
    require_gpu_fit(plan.gpus, spec, options.gpu)
    hint = f"raise --memory to {format_bytes_up(plan.lower_bound_bytes).replace(' ', '')}"
    if options.context is not None and options.context > MIN_CONTEXT:
        opened = replace(options, context=None)
        planner = _Planner(
            spec, opened, plan.budget.num_bytes, baseline, sizes or FormulaSizes(spec)
        )
        shorter = planner.best()
        if shorter is not None:
            hint += f", shorten --context to {shorter.context}"
    raise OverBudget(
        f"{spec.name} with a context of {plan.context} tokens",
        plan.lower_bound_bytes,
        plan.budget.num_bytes,
        f"{hint}, or pick a smaller model",
    )


def _check(spec: ModelSpec, options: PlanRequest) -> None:
    if options.context is not None and options.context > spec.context_length:
        raise BadOption(
            f"context is {options.context} tokens, {spec.name} was made for {spec.context_length}: "
            f"ask for {spec.context_length} or less"
        )
    if options.kv_type is not None and options.kv_type not in spec.kv_types:
        raise BadOption(
            f"kv_type is {options.kv_type!r}, the graph of {spec.name} keeps "
            f"{', '.join(spec.kv_types)}: leave it out"
        )
    if options.kv_type is not None and not footprint.supports_kv_type(spec, options.kv_type):
        raise BadOption(
            f"kv_type is {options.kv_type!r}, which needs heads of a multiple of 32; {spec.name} "
            f"has {spec.key_head_dim}: use f16"
        )


class _Planner:
    """Walks through the choices for one model, wish, host and budget."""

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
        self.rows = PlanLines(spec, options, baseline, sizes)
        self._row_choices = ROW_CHOICES if options.batch_size is None else (options.batch_size,)
        # What is read again from the file for every pass is not what a device holds.
        self._can_stream = (
            baseline.can_stream_weights and bool(spec.weight_groups) and not options.gpu
        )

    def preferred(self) -> PlanCandidate:
        """Return what is chosen where memory is no matter."""
        context = self._options.context or self._spec.context_length
        choice = self._choice(context, self._kv_types[0])
        return replace(
            choice,
            prefix_bytes=self._options.prefix_bytes,
            cache_filter_pass=self._options.filter_prefill is not None,
            verify_batch=max(self._verifications, default=0),
        )

    def best(self) -> PlanCandidate | None:
        """Return the best choice that fits, what is kept for later in what the rest leaves; None for none.

        What the watchdog would give back at once is not kept.
        """
        found = self._best_of_the_rest()
        if found is None:
            return None
        watched_bytes = int(self._budget_bytes * WATCHED_SHARE)
        if self._options.filter_prefill is not None:
            keeping = replace(found, cache_filter_pass=True)
            found = keeping if self.rows.total_bytes(keeping) <= watched_bytes else found
        left_bytes = watched_bytes - self.rows.total_bytes(found)
        found = replace(found, prefix_bytes=min(self._options.prefix_bytes, max(left_bytes, 0)))
        return self._speculating(found, watched_bytes)

    def _speculating(self, found: PlanCandidate, most_bytes: int) -> PlanCandidate:
        """Return the choice with as many rows of a verification as there is room for."""
        choices = (replace(found, verify_batch=rows) for rows in self._verifications)
        return next((c for c in choices if self.rows.total_bytes(c) <= most_bytes), found)

    def _best_of_the_rest(self) -> PlanCandidate | None:
        """Return the first choice that fits, with as many layers kept as fit; None where none does."""
        found = next(filter(self._fits, self._from_best_to_smallest()), None)
        if found is None or found.resident_layers is None:
            return found
        # A pass that reads its weights again costs the same whatever its rows: those come before layers.
        found = self._speculating(found, self._budget_bytes)
        return self._longest(
            lambda layers: replace(found, resident_layers=layers), 0, self._spec.num_layers
        )

    def smallest(self) -> PlanCandidate:
        """Return the choice that takes the fewest bytes."""
        context = self._options.context or min(MIN_CONTEXT, self._spec.context_length)
        room = min(context, MIN_CONTEXT) if self._baseline.kv_on_demand else context
        choices = [
            self._small(context, kv_type, resident_layers=kept, kv_tokens=room)
            for kv_type in self._kv_types
            for kept in self._weight_choices
        ]
        return min(choices, key=lambda c: (self._beyond_gpus(c), self.rows.total_bytes(c)))

    def _from_best_to_smallest(self) -> Iterator[PlanCandidate]:
        stated = self._options.context
        for kv_type in self._kv_types:
            for kept in self._weight_choices:
                if kept is None:
                    for batch_size in self._row_choices:
                        context = stated or self._spec.context_length
                        yield self._choice(context, kv_type, batch_size)
                if stated is not None:
                    yield self._small(stated, kv_type, resident_layers=kept)
                else:
                    yield from self._longest_context(kv_type, kept)
        if stated is not None and self._baseline.kv_on_demand:
            for kv_type in self._kv_types:
                yield from self._most_room(stated, kv_type)

    def _longest_context(
        self, kv_type: str, resident_layers: int | None
    ) -> Iterator[PlanCandidate]:
        """Yield the longest context that fits, in whole steps of the cache, where one does."""
        most = self._spec.context_length
        found = self._longest(
            lambda steps: self._small(
                min(max(steps * KV_PADDING, MIN_CONTEXT), most),
                kv_type,
                resident_layers=resident_layers,
            ),
            MIN_CONTEXT // KV_PADDING,
            -(-most // KV_PADDING),
        )
        if found is not None:
            yield found

    def _most_room(self, context: int, kv_type: str) -> Iterator[PlanCandidate]:
        """Yield the stated context with the most room in its cache that fits, where any does."""
        kept = self._weight_choices[-1]
        found = self._longest(
            lambda steps: self._small(
                context, kv_type, resident_layers=kept, kv_tokens=min(steps * KV_PADDING, context)
            ),
            MIN_CONTEXT // KV_PADDING,
            -(-context // KV_PADDING),
        )
        if found is not None:
            yield found

    def _longest(
        self, choice_of: Callable[[int], PlanCandidate], least: int, most: int
    ) -> PlanCandidate | None:
        """Return the choice of the largest number from `least` to `most` that fits."""
        if not self._fits(choice_of(least)):
            return None
        low, high = least, max(most, least) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(choice_of(middle)):
                low = middle
            else:
                high = middle
        return choice_of(low)

    def _fits(self, choice: PlanCandidate) -> bool:
        inside = self.rows.total_bytes(choice) <= self._budget_bytes
        return inside and not self._beyond_gpus(choice)

    def _beyond_gpus(self, choice: PlanCandidate) -> int:
        """By how many bytes the layers that are wanted on devices pass what those may hold."""
        gpus = self.rows.gpus(choice)
        return sum(max(gpu.total_bytes - gpu.budget_bytes, 0) for gpu in gpus)

    def _choice(self, context: int, kv_type: str, batch_size: int | None = None) -> PlanCandidate:
        rows = batch_size or self._row_choices[0]
        wish = self._options.speculation
        least_verified = min(self._verifications) if wish and wish.draft_model else 0
        return PlanCandidate(
            context=context,
            batch_size=rows,
            kv_type=kv_type,
            kv_tokens=context,
            verify_batch=least_verified,
        )

    def _small(
        self,
        context: int,
        kv_type: str,
        *,
        resident_layers: int | None,
        kv_tokens: int | None = None,
    ) -> PlanCandidate:
        choice = self._choice(context, kv_type, self._row_choices[-1])
        return replace(
            choice, resident_layers=resident_layers, kv_tokens=kv_tokens if kv_tokens else context
        )

    @property
    def _verifications(self) -> tuple[int, ...]:
        """Rows of a verification, from the most; none where nothing is drafted."""
        wish = self._options.speculation
        return wish.row_choices() if wish is not None else ()

    @property
    def _weight_choices(self) -> tuple[int | None, ...]:
        """Resident, and, where they can be, read again for every pass."""
        return (None, 0) if self._can_stream else (None,)

    @property
    def _kv_types(self) -> tuple[str, ...]:
        if self._options.kv_type is not None:
            return (self._options.kv_type,)
        return tuple(
            kind for kind in self._spec.kv_types if footprint.supports_kv_type(self._spec, kind)
        )
