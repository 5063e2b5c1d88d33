"""GgufEmbedder: texts to vectors with llama.cpp, several texts in one pass.

A text is computed in one piece: an encoder reads it in both directions, and llama.cpp pools only tokens of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError
from lowtide.models.gguf.header.kind import POOLINGS, UNSPECIFIED_POOLING, llama_kind
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.gguf.model import created, load_weights, require_pass
from lowtide.models.gguf.parameters import LoadOptions, context_parameters
from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.models.kind import DECODER
from lowtide.models.logits import ADVICE
from lowtide.models.spec import ModelSpec
from lowtide.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


@dataclass(frozen=True, slots=True)
class Weights:
    """A loaded model of llama.cpp, which somebody else frees."""

    model: Any
    tokenizer: Tokenizer


def embedding_options(
    context: int, threads: int, pooling: str, num_sequences: int, *, memory_map: bool = True
) -> LoadOptions:
    """Return the options of a context that embeds up to `num_sequences` texts of `context` tokens in all."""
    return LoadOptions(
        context=context,
        batch_size=context,
        threads=threads,
        memory_map=memory_map,
        verify_batch=context,
        sequences=num_sequences,
        pooling=POOLINGS.index(pooling),
    )


class GgufEmbedder:
    """One llama.cpp model with a context that embeds, on weights of its own or on `weights`.

    Raises `ModelError` with llama.cpp's reason where it refuses the file or the context.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: LoadOptions,
        library: LlamaLibrary,
        weights: Weights | None = None,
    ) -> None:
        self.name = spec.name
        self._api = library.api
        self._library = library
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._owns_weights = weights is None
        try:
            self._model = weights.model if weights else load_weights(library, spec, options)
            vocabulary = self._api.llama_model_get_vocab(self._model)
            self.tokenizer: Tokenizer = (
                weights.tokenizer if weights else GgufTokenizer(library, vocabulary)
            )
            self._vocabulary_size = int(self._api.llama_vocab_n_tokens(vocabulary))
            if self._api.llama_model_is_recurrent(self._model) or (
                self._api.llama_model_is_hybrid(self._model)
            ):
                # llama.cpp would cut the texts of a pass into pieces of equal length, and pool the last ones.
                options = replace(options, sequences=1)
            self._context = created(
                library,
                lambda: self._api.llama_init_from_model(
                    self._model, context_parameters(self._api, options)
                ),
                f"a context of {options.context} tokens for {spec.name}",
            )
            self._memory = self._api.llama_get_memory(self._context)
            # Of the layers of an encoder-decoder, its encoder's are computed.
            kind = llama_kind(self._api, self._model, self._context)
            self._function = "llama_decode" if kind == DECODER else "llama_encode"
            self._batch = self._api.llama_batch_init(options.batch_size, 0, 1)
            self.max_tokens, self.max_sequences = options.batch_size, options.sequences
            if weights is None and spec.unusual_tensors:
                self._fill([(0,)])
                require_pass(library, spec, self._function, self._context, self._batch)
        except BaseException:
            self.close()
            raise
        self.width = int(self._api.llama_model_n_embd_out(self._model))
        self._is_pooled = options.pooling not in (UNSPECIFIED_POOLING, POOLINGS.index("none"))

    def embed(self, texts: Sequence[Sequence[int]]) -> list[Logits2D]:
        """Return the embeddings of texts of tokens: for each one vector, or one for each token, in fp32.

        Arrays have shape [1 or num_tokens, width] and are copies. Raises `ForwardError` where the pass fails.
        """
        import numpy as np

        self._fill(texts)
        if self._memory:
            self._api.llama_memory_clear(self._memory, False)
        with self._library.collected_errors() as errors:
            code = self._library.decode(self._context, self._batch, self._function)
        if code != 0:
            reason = errors[-1] if errors else f"llama.cpp returned {code}"
            raise ForwardError(f"embedding {len(texts)} texts failed: {reason}")
        vectors = self._vectors(texts)
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise ForwardError(f"{self.name}: the embeddings are not numbers; {ADVICE}")
        return vectors

    def _vectors(self, texts: Sequence[Sequence[int]]) -> list[Logits2D]:
        import numpy as np

        if self._is_pooled:
            return [
                np.array(np.ctypeslib.as_array(self._pooled(i), shape=(1, self.width)))
                for i in range(len(texts))
            ]
        pointer = self._api.llama_get_embeddings(self._context)
        num_tokens = sum(map(len, texts))
        vectors = np.array(np.ctypeslib.as_array(pointer, shape=(num_tokens, self.width)))
        return np.split(vectors, np.cumsum([len(text) for text in texts])[:-1])

    def _pooled(self, sequence: int) -> Any:
        pointer = self._api.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise ForwardError(f"llama.cpp returned no embedding of text {sequence}")
        return pointer

    def _fill(self, texts: Sequence[Sequence[int]]) -> None:
        if self._context is None:
            raise ForwardError("the model is closed: open it again")
        num_tokens = sum(map(len, texts))
        if not all(texts) or not 0 < num_tokens <= self.max_tokens:
            raise ForwardError(
                f"a pass has {num_tokens} tokens; it must have 1 to {self.max_tokens}, of each text at least one"
            )
        if len(texts) > self.max_sequences:
            raise ForwardError(
                f"a pass has {len(texts)} texts; the context has room for {self.max_sequences}"
            )
        batch, i = self._batch, 0
        for sequence, token_ids in enumerate(texts):
            for position, token_id in enumerate(token_ids):
                if not 0 <= token_id < self._vocabulary_size:
                    raise ForwardError(
                        f"token {token_id} is not in the vocabulary of {self._vocabulary_size}"
                    )
                batch.token[i] = token_id
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = True
                i += 1
        batch.n_tokens = i

    def close(self) -> None:
        """Free the context, and weights of its own. Closing twice is allowed."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        if self._context is not None:
            self._library.free_context(self._context)
            self._context = None
        if self._model is not None and self._owns_weights:
            self._library.free_weights(self._model)
        self._model = None
