"""Embedder: a model that turns texts into vectors, inside a memory budget."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.decode import install_guarded_passes
from lowtide.attention.bindings.library import guarded_aborts
from lowtide.attention.bindings.tokenize import install_guarded_tokenizer
from lowtide.memory.budget import Ledger
from lowtide.memory.os.kv_pages import demand_zero_buffers
from lowtide.memory.plan.line import VECTORS
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.process import not_charged_if_refused, read_process_memory
from lowtide.memory.units import OverBudget
from lowtide.models.arguments.names import option
from lowtide.models.gguf.embedding import GgufEmbedder, embedding_options
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.models.spec import ModelSpec
from lowtide.runtime.embedding.options import EmbeddingConfig, require_pooled
from lowtide.runtime.embedding.passes import EmbeddingPasses, checked_texts
from lowtide.runtime.embedding.plan import PlannedEmbedding, num_sequences, plan_reference
from lowtide.runtime.generation.active import ActiveGeneration, collect_dropped
from lowtide.runtime.generation.closable import ClosableGenerator

if TYPE_CHECKING:
    from lowtide.runtime.embedding.passes import Vectors


class Embedder:
    """A loaded model that embeds texts inside its memory plan. Made by `Embedder.open`; a context manager.

    Encoders and decoders embed. Threads may share an embedder: one of them computes at a time. An embedder that is
    dropped without `close` is freed when it is collected, with a `ResourceWarning`.
    """

    def __init__(self, planned: PlannedEmbedding) -> None:
        planned.require_fit()
        self.planned = planned
        plan = planned.plan
        self._ledger = Ledger(plan.budget.num_bytes)
        for line in plan.rows:
            self._ledger.reserve(line.component, line.num_bytes)
        options = embedding_options(
            plan.context,
            planned.config.num_threads,
            planned.pooling,
            num_sequences(plan.context),
            memory_map=plan.memory_map,
        )
        install_guarded_tokenizer()
        install_guarded_passes()
        with guarded_aborts(), demand_zero_buffers():
            self._model = GgufEmbedder(planned.spec, options, llama_library())
        self._active = ActiveGeneration(self._free, "embedder")
        self._passes = EmbeddingPasses(
            self._model,
            self._active.between_steps,
            batch_size=plan.batch_size,
            overflow=planned.config.overflow,
        )
        if read_process_memory().peak_bytes > plan.budget.num_bytes:
            self.close()
            raise OverBudget(
                f"{planned.spec.name}, loaded,",
                read_process_memory().peak_bytes,
                plan.budget.num_bytes,
                f"raise {option('memory')}",
            )

    @classmethod
    def open(cls, model: str | Path | None = None, **options: Any) -> Embedder:
        """Plan and load a model for embedding so that the whole process stays inside the budget.

        `model` is a path, a name ("smollm2"), "hf:user/repo:Q4_K_M", or None for the default model. The `options` are
        the fields of `EmbeddingConfig`, by name:

        * `memory`: the budget, a size ("1GiB") or a share ("50%") of the available memory; default 80%
        * `context`: tokens of the longest text; default up to 2,048 tokens, as many as fit
        * `batch_size`: texts are computed together up to so many tokens; default 512
        * `threads`: default the cores that this process may use
        * `pooling`: "mean", "cls", "last" or "none"; default what the model's header says, or "mean"
        * `overflow`: "error" (the default) or "truncate", for a text that is too long
        * `offline`: True downloads nothing

        Raises `OverBudget`, before anything is loaded, if the model cannot fit, `ModelError` for an unusable model,
        and `BadOption` for a wrong option or value.
        """
        config = EmbeddingConfig.of(**options)
        collect_dropped()
        with not_charged_if_refused():
            return cls(plan_reference(model, config))

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan; prints as a table. Its `context` is the longest text in tokens."""
        return self.planned.plan

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and size."""
        return self.planned.spec

    @property
    def pooling(self) -> str:
        """How the vectors of a text's tokens become one."""
        return self.planned.pooling

    @property
    def width(self) -> int:
        """The length of a vector."""
        return self._model.width

    def embed(self, texts: str | Sequence[str], *, normalize: bool = True) -> Vectors:
        """Return the embeddings of texts: fp32, shape [number of texts, width]; one text is a list of one.

        With `normalize` each vector has the length 1 (L2). A vector does not depend on the other texts, but for
        rounding. Raises `TextTooLong` for a text that is longer than the plan's context, `OverBudget` where the
        result itself does not fit the budget, and `BadOption` with the pooling "none": see `embed_tokens`.
        """
        import numpy as np

        require_pooled(self.pooling)
        texts = checked_texts(texts)
        with self._active.between_steps():
            self._ledger.reserve(VECTORS, 4 * self.width * len(texts))
            try:
                vectors = np.empty((len(texts), self.width), np.float32)
                for i, vector in enumerate(self.stream(texts, normalize=normalize)):
                    vectors[i] = vector[0]
                return vectors
            finally:
                self._ledger.release(VECTORS)

    def embed_tokens(self, texts: str | Sequence[str], *, normalize: bool = True) -> list[Vectors]:
        """Return the embeddings of each text's tokens: fp32, shape [number of tokens, width] for each text.

        With a pooling other than "none" each array has one row.
        """
        return list(self.stream(checked_texts(texts), normalize=normalize))

    def stream(
        self, texts: Iterable[str], *, normalize: bool = True
    ) -> Generator[Vectors, None, None]:
        """Yield the embeddings of texts in order, as they are computed; `texts` may be a generator.

        Each is an fp32 array of shape [1, width], or [number of tokens, width] with the pooling "none". Any thread may
        close the generator.
        """
        return ClosableGenerator(self._passes.run(texts, normalize=normalize))

    def close(self) -> None:
        """Free the model when the pass that runs is done; closing twice is allowed."""
        self._active.close()

    def _free(self) -> None:
        self._model.close()
        for component in self._ledger.components:
            self._ledger.release(component)

    def __del__(self) -> None:
        """Free the model of an embedder that nobody closed, with a `ResourceWarning`."""
        active = getattr(self, "_active", None)  # None where __init__ failed
        if active is not None:
            active.close_dropped(self.spec.name, self)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
