"""From a model to the plan of embedding with it, before any weight is loaded."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.memory.budget import Budget
from lowtide.memory.machine import Machine, read_machine
from lowtide.memory.os.pages import trim_heap
from lowtide.memory.plan import estimates
from lowtide.memory.plan.embedding import (
    MAX_SEQUENCES,
    EmbeddingSizes,
    LaysOut,
    plan_embedding,
    require_fit,
)
from lowtide.memory.plan.plan import MemoryPlan, ProcessBaseline
from lowtide.memory.process import read_process_memory
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.names import option
from lowtide.models.errors import UnsupportedModel
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.embedding import embedding_options
from lowtide.models.kind import ENCODER
from lowtide.models.onnx.config import ENGINE as ONNXRUNTIME
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.gguf_baseline import preload, process_baseline
from lowtide.runtime.backends.kernels.layouts import SHORTEST_LAYOUT, layout_bytes
from lowtide.runtime.embedding.options import EmbeddingConfig, pooling_of
from lowtide.runtime.planning.plan import find_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEmbedding:
    """A model with the plan of embedding with it; `pooling` is how the vectors of tokens become one."""

    spec: ModelSpec
    machine: Machine
    plan: MemoryPlan
    config: EmbeddingConfig
    pooling: str

    def require_fit(self) -> None:
        """Raise `OverBudget` where the plan, or what this process has used so far, is over the budget."""
        require_fit(self.plan, self.spec)
        peak, limit = read_process_memory().peak_bytes, self.plan.budget.num_bytes
        if peak > limit:
            raise OverBudget(
                "this process, at its peak so far,",
                peak,
                limit,
                f"raise {option('memory')}, or embed in a process of its own",
            )


def plan_reference(reference: str | Path | None, config: EmbeddingConfig) -> PlannedEmbedding:
    """Find the model, read its headers and plan; load no weights."""
    return plan_spec(find_spec(reference, offline=config.offline), config)


def plan_spec(spec: ModelSpec, config: EmbeddingConfig) -> PlannedEmbedding:
    """Plan to embed with a model of a known spec.

    Raises `UnsupportedModel` for an ONNX model and for a reranker.
    """
    if spec.engine == ONNXRUNTIME:
        raise UnsupportedModel(
            f"{spec.name} is an ONNX model, and lowtide embeds with GGUF models: use the model as a GGUF file"
        )
    pooling = pooling_of(spec, config.pooling)
    machine = read_machine()
    budget = Budget.from_user(config.memory, machine)
    formulas = ProcessBaseline(
        interpreter_bytes=estimates.interpreter_bytes(read_process_memory()),
        processor=platform.machine(),
    )
    if formulas.interpreter_bytes <= budget.num_bytes:
        preload()
        formulas = replace(formulas, interpreter_bytes=max(read_process_memory().resident_bytes, 1))
    model_bytes = estimates.described_bytes(spec)
    least = max(estimates.loading_bytes(spec), layout_bytes(spec, SHORTEST_LAYOUT))
    if formulas.interpreter_bytes + model_bytes + least > budget.num_bytes:
        plan = plan_embedding(spec, config.request, budget, formulas, formula_sizes(spec))
        return PlannedEmbedding(
            spec=spec, machine=machine, plan=plan, config=config, pooling=pooling
        )
    with guarded_aborts():
        simulated = SimulatedGguf(spec)
        try:
            simulated.hold(SHORTEST_LAYOUT, 1, "f16")
            grown_bytes = read_process_memory().resident_bytes - formulas.interpreter_bytes
            baseline = process_baseline(spec, formulas.interpreter_bytes, max(grown_bytes, 0))
            simulated.release()
            spec = replace(spec, kind=simulated.kind)
            sizes = _laid_out(simulated, config, pooling)
            plan = plan_embedding(spec, config.request, budget, baseline, sizes)
        finally:
            simulated.close()
            trim_heap()
    return PlannedEmbedding(spec=spec, machine=machine, plan=plan, config=config, pooling=pooling)


def _laid_out(simulated: SimulatedGguf, config: EmbeddingConfig, pooling: str) -> LaysOut:
    def sizes(context: int) -> EmbeddingSizes:
        options = embedding_options(context, config.num_threads, pooling, num_sequences(context))
        laid_out = simulated.laid_out(options)
        trim_heap()
        return EmbeddingSizes(laid_out.cache_bytes, laid_out.compute_bytes)

    return sizes


def num_sequences(context: int) -> int:
    """Return how many texts one pass may have."""
    return min(MAX_SEQUENCES, context)


def formula_sizes(spec: ModelSpec) -> LaysOut:
    """Return sizes by formulas: a decoder computes logits of all tokens, an encoder a square of scores."""

    def sizes(context: int) -> EmbeddingSizes:
        scores = 3 * 4 * max(spec.num_heads, 1) * context * estimates.padded_context(context)
        compute = estimates.compute_bytes(spec, context, context, "f16") + scores
        if spec.kind == ENCODER:
            return EmbeddingSizes(0, compute)
        logits = 4 * context * spec.vocabulary.num_tokens
        return EmbeddingSizes(estimates.kv_bytes(spec, context, "f16"), compute + logits)

    return sizes
