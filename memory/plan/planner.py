"""The planner: from a model, a request and a budget to a `MemoryPlan`, by arithmetic alone.

The candidates stand on a ladder (`memory/plan/ladder.py`), and the highest one that fits is the plan. What speculation
may take is the operating point of SpecMemo's allocator (`memory/plan/speculation/allocator.py`). Caches get what the
preferred candidate leaves. If not even the lowest rung fits, the plan does not fit. The planner never shortens a
context that the user set, and never drops a draft model that the user named.
"""

from __future__ import annotations

from dataclasses import replace

from lowtide.memory.budget import WATCHED_SHARE, Budget
from lowtide.memory.plan.estimates import ContextSizes, FormulaSizes, supports_kv_type
from lowtide.memory.plan.gpu import require_gpu_fit
from lowtide.memory.plan.ladder import MIN_CONTEXT as MIN_CONTEXT
from lowtide.memory.plan.ladder import Ladder, LadderBounds
from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.lines import PlanLines
from lowtide.memory.plan.plan import MemoryPlan, PlanRequest, ProcessBaseline
from lowtide.memory.plan.speculation.allocator import NO_SPECULATION, operating_point
from lowtide.memory.plan.speculation.candidates import SpeculationAllocation
from lowtide.memory.plan.speculation.choices import SpeculationTable
from lowtide.memory.units import OverBudget, format_bytes_up
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

BATCH_SIZES = (32, 64, 128)
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
        more_gpu_layers=planner.lines.more_gpu_layers(chosen),
        verify_batch=chosen.speculation.verify_batch,
        drafts=chosen.speculation.drafts,
        branches=chosen.speculation.branches,
        speculation=planner.table(chosen),
        own_kernels=chosen.own_kernels,
        batch=planner.lines.batch(chosen),
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
    """Finds the best candidate of one model within a budget."""

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
        self._bounds = self._make_bounds()
        self._ladder = Ladder(self._bounds)

    def preferred(self) -> PlanCandidate:
        """Return the candidate for unlimited memory."""
        return replace(
            self._ladder.top,
            prefix_bytes=self._options.prefix_bytes,
            cache_filter_pass=self._options.filter_prefill is not None,
        )

    def best(self) -> PlanCandidate | None:
        """Return the best candidate that fits, None if none does.

        Caches get only what the preferred candidate leaves below the level at which the watchdog would release
        them at once; a candidate that is not the preferred one has none, or the next MiB would shrink them.
        """
        found = self._ladder.highest(self._fits)
        if found is None:
            return None
        is_top, found = found == self._ladder.top, self._at_operating_point(found)
        if not is_top:
            return found
        # The filter pass comes before prefixes. They get what it leaves even where it does not fit itself: otherwise
        # they would shrink with the budget in which it does.
        has_filter_pass = self._options.filter_prefill is not None
        caching = replace(found, cache_filter_pass=has_filter_pass)
        left_bytes = int(self._budget_bytes * WATCHED_SHARE) - self.lines.total_bytes(caching)
        return replace(
            found,
            cache_filter_pass=has_filter_pass and left_bytes >= 0,
            prefix_bytes=min(self._options.prefix_bytes, max(left_bytes, 0)),
        )

    def _at_operating_point(self, found: PlanCandidate) -> PlanCandidate:
        """Return the candidate with the operating point of exactly this budget, where nothing else has grown yet.

        The ladder's rung may be that of a larger budget, whose best choice does not fit here.
        """
        config = self._options.speculation
        has_grown = found.kv_tokens > self._bounds.usual or (
            found.batch_size > self._bounds.batch_sizes[0]
        )
        if config is None or has_grown or found.speculation == config.least:
            return found
        without = replace(found, speculation=config.least)
        left_bytes = self._budget_bytes - self.lines.total_bytes(without)
        points = SpeculationAllocation(config, self.lines, self._spec).points(without)
        point = operating_point(points, left_bytes)
        return found if point is None else replace(found, speculation=point.choice)

    def table(self, chosen: PlanCandidate) -> SpeculationTable | None:
        """Return what speculation could take in a candidate, and what it takes; None where it is not asked for."""
        if self._options.speculation is None:
            return None
        allocation = SpeculationAllocation(self._options.speculation, self.lines, self._spec)
        return allocation.table(chosen)

    def smallest(self) -> PlanCandidate:
        """Return the candidate that needs the fewest bytes."""
        own_kernels = (False, True) if self._options.has_optional_kernels else (False,)
        candidates = [
            replace(self._ladder.smallest(kv_type, layers), own_kernels=own)
            for kv_type in self._kv_types
            for layers in ((None, 0) if self._can_stream else (None,))
            for own in own_kernels
        ]
        return min(candidates, key=self._cost)

    def _make_bounds(self) -> LadderBounds:
        options = self._options
        bounds = LadderBounds(
            longest=options.context or self._spec.context_length,
            stated_context=options.context,
            expected=options.expected_tokens,
            kv_on_demand=self._baseline.kv_on_demand,
            kv_types=self._kv_types[:1],
            batch_sizes=BATCH_SIZES if options.batch_size is None else (options.batch_size,),
            speculations=(options.speculation.least if options.speculation else NO_SPECULATION,),
            num_layers=self._spec.num_layers,
            streams=False,
            optional_kernels=options.has_optional_kernels,
        )
        streams = self._streaming_helps(Ladder(bounds))
        bounds = replace(bounds, streams=streams, streamed_speculations=bounds.speculations)
        bounds = replace(bounds, kv_types=self._helpful_kv_types(bounds))
        return self._with_speculation(bounds)

    def _with_speculation(self, bounds: LadderBounds) -> LadderBounds:
        """Return the bounds with the operating points, where the weights are resident and where they are not."""
        config = self._options.speculation
        if config is None:
            return bounds
        allocation = SpeculationAllocation(config, self.lines, self._spec)
        usual = replace(Ladder(replace(bounds, longest=bounds.usual)).top, resident_layers=None)
        resident = replace(bounds, speculations=allocation.operating_points(usual))
        if not bounds.streams:
            return resident
        streamed = replace(usual, resident_layers=0)
        return replace(
            resident,
            streamed_speculations=allocation.operating_points(streamed),
            speculation_first=allocation.saves_more_than_layers(streamed),
        )

    def _streaming_helps(self, ladder: Ladder) -> bool:
        """Whether streamed weights take less than resident ones; tiny models have nothing to stream."""
        if not self._can_stream:
            return False
        kv_type = self._kv_types[0]
        return self._cost(ladder.smallest(kv_type, 0)) < self._cost(ladder.smallest(kv_type, None))

    def _helpful_kv_types(self, bounds: LadderBounds) -> tuple[str, ...]:
        """Return the preferred type last, and before it those that take less, with few tokens and with many."""
        choices = [
            replace(
                Ladder(replace(bounds, longest=tokens)).top,
                batch_size=bounds.batch_sizes[0],
                resident_layers=0 if bounds.streams else None,
            )
            for tokens in (bounds.least, bounds.needed)
        ]
        helpful = [self._kv_types[0]]
        for kv_type in self._kv_types[1:]:
            if all(
                self._cost(replace(choice, kv_type=kv_type))
                < self._cost(replace(choice, kv_type=helpful[-1]))
                for choice in choices
            ):
                helpful.append(kv_type)
        return tuple(reversed(helpful))

    def _fits(self, candidate: PlanCandidate) -> bool:
        beyond_gpus, num_bytes = self._cost(candidate)
        return num_bytes <= self._budget_bytes and not beyond_gpus

    def _cost(self, candidate: PlanCandidate) -> tuple[int, int]:
        """Return by how many bytes the requested layers exceed the budgets of their GPUs, and the planned peak."""
        gpus = self.lines.gpus(candidate)
        beyond_gpus = sum(max(gpu.total_bytes - gpu.budget_bytes, 0) for gpu in gpus)
        return beyond_gpus, self.lines.total_bytes(candidate)

    @property
    def _can_stream(self) -> bool:
        """Whether weights can be streamed from the file; those on a GPU are not."""
        has_groups = bool(self._spec.weight_groups)
        return self._baseline.can_stream_weights and has_groups and not self._options.gpu

    @property
    def _kv_types(self) -> tuple[str, ...]:
        """The types that may be chosen, the preferred one first."""
        if self._options.kv_type is not None:
            return (self._options.kv_type,)
        return tuple(kind for kind in self._spec.kv_types if supports_kv_type(self._spec, kind))
