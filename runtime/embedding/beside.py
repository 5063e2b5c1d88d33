"""Embeds with the weights of a runtime that generates, in memory that its KV cache does not use meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowtide.memory.plan import estimates
from lowtide.memory.plan.embedding import (
    PASS_TOKENS,
    PREFERRED_CONTEXT,
    SHORTEST_CONTEXT,
    embedding_lines,
)
from lowtide.memory.plan.line import EMBEDDINGS
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.gguf.embedding import embedding_options
from lowtide.runtime.embedding.options import EmbeddingConfig, pooling_of
from lowtide.runtime.embedding.passes import EmbeddingPasses
from lowtide.runtime.embedding.plan import formula_sizes, num_sequences
from lowtide.runtime.loading.load import Engine

if TYPE_CHECKING:
    from lowtide.runtime.embedding.passes import Vectors


def embedded(
    engine: Engine,
    num_cached: int,
    texts: Sequence[str],
    config: EmbeddingConfig,
    *,
    normalize: bool,
) -> Vectors:
    """Return the vectors of texts, computed beside `num_cached` tokens in the KV cache; see `passes_beside`."""
    import numpy as np

    with passes_beside(engine, num_cached, len(texts), config) as passes:
        vectors = np.empty((len(texts), passes.width), np.float32)
        for i, vector in enumerate(passes.run(texts, normalize=normalize)):
            vectors[i] = vector[0]
        return vectors


@contextlib.contextmanager
def passes_beside(
    engine: Engine, num_cached: int, num_texts: int, config: EmbeddingConfig
) -> Iterator[EmbeddingPasses]:
    """Yield what embeds with the engine's weights, in a context of its own, which is freed after the block.

    `num_cached` tokens are in the KV cache; nothing may be added to it meanwhile. Texts may be as long as the
    memory allows. Raises `OverBudget`, before anything is allocated, where there is none, and `BadOption` where
    the weights are streamed or on a GPU.
    """
    spec, plan = engine.planned.spec, engine.planned.plan
    if plan.resident_layers is not None or plan.gpus:
        raise BadOption(
            f"{spec.name} is open with streamed weights or on a GPU, which embedding cannot read: open it with "
            "lowtide.Embedder"
        )
    pooling = pooling_of(spec, config.pooling)
    context = _reserve(engine, num_cached, num_texts)
    try:
        options = embedding_options(
            context, engine.planned.options.num_threads, pooling, num_sequences(context)
        )
        with engine.embedder(options) as embedder:
            yield EmbeddingPasses(
                embedder,
                contextlib.nullcontext,
                batch_size=min(PASS_TOKENS, context),
                overflow=config.overflow,
            )
    finally:
        engine.ledger.release(EMBEDDINGS)
        engine.trim("background")


def _reserve(engine: Engine, num_cached: int, num_texts: int) -> int:
    """Reserve the bytes of the longest context that there is room for; return its tokens."""
    spec, ledger = engine.planned.spec, engine.ledger
    idle_bytes = engine.idle_bytes(num_cached)
    context = min(engine.planned.plan.context, PREFERRED_CONTEXT)
    while True:
        sizes = formula_sizes(spec)(context)
        lines = embedding_lines(spec, sizes, context)
        beside = estimates.CONTEXT_BYTES + estimates.slot_bytes(spec, context, context)
        if spec.repacked_tensors:
            beside += estimates.matmul_scratch_bytes(spec, context)
        results = 4 * spec.embedding_width * num_texts
        num_bytes = beside + results + sum(line.num_bytes for line in lines)
        try:
            ledger.reserve(EMBEDDINGS, max(num_bytes - idle_bytes, 0))
            return context
        except OverBudget:
            if context <= SHORTEST_CONTEXT:
                raise OverBudget(
                    f"embedding beside {spec.name}, as it is loaded,",
                    ledger.reserved_bytes + num_bytes - idle_bytes,
                    ledger.budget_bytes,
                    f"raise {option('memory')}, or shorten {option('context')}",
                ) from None
            context = max(context // 2, SHORTEST_CONTEXT)
