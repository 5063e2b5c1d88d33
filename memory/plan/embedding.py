"""The memory plan of a model that embeds texts: `plan_embedding`.

Nothing is sampled and nothing stays in a cache: a pass takes a compute buffer, outputs for each of its tokens, and
for a decoder the keys and values of these tokens. If not everything fits, the longest text is made shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lowtide.memory.budget import Budget
from lowtide.memory.plan import estimates
from lowtide.memory.plan import line as components
from lowtide.memory.plan.line import PlanLine
from lowtide.memory.plan.plan import MemoryPlan, ProcessBaseline
from lowtide.memory.units import OverBudget, format_bytes_up
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.kind import DECODER
from lowtide.models.spec import ModelSpec

PREFERRED_CONTEXT = 2048
"""Tokens of the longest text, where the model allows it and nobody asks for more: the buffers grow with them."""
SHORTEST_CONTEXT = 32
PASS_TOKENS = 512
"""Texts are computed together up to so many tokens: longer passes are not faster on a processor."""
MAX_SEQUENCES = 64
"""Texts of a pass."""
TOKEN_BYTES = 128
"""A token in Python's lists, and in llama.cpp's batch with the lists of its sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """What the user asked for; None leaves the choice to the plan."""

    context: int | None = None
    batch_size: int | None = None
    threads: int = 2


@dataclass(frozen=True, slots=True)
class EmbeddingSizes:
    """The bytes of a context that embeds, as llama.cpp lays it out."""

    cache_bytes: int
    compute_bytes: int


class LaysOut(Protocol):
    """Gives the sizes of a context for texts of `context` tokens."""

    def __call__(self, context: int) -> EmbeddingSizes:
        """Return the sizes; raise `ModelError` where llama.cpp cannot make such a context."""


def plan_embedding(
    spec: ModelSpec,
    request: EmbeddingRequest,
    budget: Budget,
    baseline: ProcessBaseline,
    sizes: LaysOut,
) -> MemoryPlan:
    """Return the plan for the longest texts that fit, or for the shortest ones if none do.

    `context` of the plan is the length of the longest text in tokens, `batch_size` the tokens up to which texts
    are computed together. Raises `BadOption` for a context that the model was not trained for.
    """
    lines = EmbeddingLines(spec, request, baseline, sizes)
    contexts = _contexts(spec, request)
    fits = (c for c in contexts if lines.total_bytes(c) <= budget.num_bytes)
    context = next(fits, contexts[-1])
    smallest = lines.total_bytes(contexts[-1])
    return MemoryPlan(
        budget=budget,
        rows=lines.of(context),
        lower_bound_bytes=smallest + baseline.tolerance_bytes,
        context=context,
        batch_size=min(request.batch_size or PASS_TOKENS, context),
        kv_type="f16",
        kv_tokens=context if spec.kind == DECODER else 0,
        cache_tokens=context if spec.kind == DECODER else 0,
        cache_filter_pass=False,
        memory_map=lines.memory_map,
        resident_layers=None,
        downgrades=()
        if context == contexts[0]
        else (f"longest text: {contexts[0]} to {context} tokens",),
    )


def require_fit(plan: MemoryPlan, spec: ModelSpec) -> None:
    """Raise `OverBudget`, with the lower bound and what to change, if the plan does not fit."""
    if plan.fits:
        return
    raise OverBudget(
        f"embedding texts of {plan.context} tokens with {spec.name}",
        plan.lower_bound_bytes,
        plan.budget.num_bytes,
        f"raise {option('memory')} to {format_bytes_up(plan.lower_bound_bytes).replace(' ', '')}, shorten "
        f"{option('context')}, or pick a smaller model",
    )


def _contexts(spec: ModelSpec, request: EmbeddingRequest) -> list[int]:
    """Return the lengths of the longest text to try, in order."""
    if request.context is not None:
        if request.context > spec.context_length:
            raise BadOption(
                f"{option('context')} is {request.context} tokens, but {spec.name} was trained for "
                f"{spec.context_length}: ask for {spec.context_length} or less"
            )
        return [request.context]
    context = min(spec.context_length, max(PREFERRED_CONTEXT, request.batch_size or 0))
    contexts = [context]
    while context > SHORTEST_CONTEXT:
        context = max(context // 2, SHORTEST_CONTEXT)
        contexts.append(context)
    return contexts


class EmbeddingLines:
    """Computes the lines of the plan for each length of the longest text."""

    def __init__(
        self,
        spec: ModelSpec,
        request: EmbeddingRequest,
        baseline: ProcessBaseline,
        sizes: LaysOut,
    ) -> None:
        self._spec, self._request = spec, request
        self._baseline, self._sizes = baseline, sizes
        self.memory_map = not (baseline.repacks and estimates.is_repacked(spec, baseline.processor))
        self._lines: dict[int, tuple[PlanLine, ...]] = {}

    def total_bytes(self, context: int) -> int:
        """Return the planned peak."""
        return sum(line.num_bytes for line in self.of(context))

    def of(self, context: int) -> tuple[PlanLine, ...]:
        """Return one line per component."""
        if context not in self._lines:
            self._lines[context] = self._made(context)
        return self._lines[context]

    def _made(self, context: int) -> tuple[PlanLine, ...]:
        spec, baseline, sizes = self._spec, self._baseline, self._sizes(context)
        running = embedding_lines(spec, sizes, context)
        weights = estimates.weight_bytes(spec, memory_map=self.memory_map)
        loading = max(
            estimates.loading_bytes(spec, baseline.header_loading_bytes),
            baseline.vocabulary_loading_bytes - weights,
        ) - sum(line.num_bytes for line in running)
        vocabulary = estimates.described_bytes(spec)
        return (
            PlanLine(
                components.INTERPRETER,
                baseline.interpreter_bytes,
                f"Python, numpy, {spec.engine}",
            ),
            PlanLine(
                components.VOCABULARY,
                vocabulary if baseline.vocabulary_bytes is None else baseline.vocabulary_bytes,
                f"{spec.vocabulary.num_tokens:,} tokens",
            ),
            PlanLine(
                components.WEIGHTS,
                weights,
                f"{spec.quantisation}, "
                + ("memory-mapped" if self.memory_map else "copied and repacked by llama.cpp"),
            ),
            *running,
            PlanLine(
                components.LOADING, max(loading, 0), "temporary, beyond the memory used later"
            ),
            PlanLine(
                components.RESERVE,
                max(
                    estimates.RESERVE_BYTES,
                    estimates.SLACK_BYTES
                    + estimates.slot_bytes(spec, context, context)
                    + estimates.graph_bytes(spec),
                ),
                "allocator slack, KV slots, graph",
            ),
        )


def embedding_lines(spec: ModelSpec, sizes: EmbeddingSizes, context: int) -> tuple[PlanLine, ...]:
    """Return the lines of a context that embeds texts of up to `context` tokens."""
    # llama.cpp has room for the logits of encoders too. Twice, because its buffer grows with the passes, and the old
    # one may still be resident then.
    outputs = spec.embedding_width + spec.vocabulary.num_tokens
    why = "vectors and logits of all tokens of a pass"
    text = estimates.prompt_bytes(spec, context)
    return (
        PlanLine(components.CACHE, sizes.cache_bytes, "keys and values of a pass"),
        PlanLine(components.COMPUTE, sizes.compute_bytes, f"passes of up to {context:,} tokens"),
        PlanLine(
            components.EMBEDDINGS,
            2 * 4 * outputs * context + 8 * MAX_SEQUENCES * spec.embedding_width,
            why,
        ),
        PlanLine(
            components.PROMPT,
            text + 2 * context * TOKEN_BYTES,
            f"{estimates.prompt_limit_bytes(context):,} bytes of text, and the tokens of a pass",
        ),
    )
