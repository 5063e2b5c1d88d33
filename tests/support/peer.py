"""llama.cpp through its C API alone: the baseline of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from llama_bindings import llama_bindings


class Peer:
    """One model and context; greedy decoding in the shortest loop that Python allows."""

    def __init__(self, path: Path, *, context: int, batch_size: int, threads: int) -> None:
        self.api = api = llama_bindings()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(str(path).encode(), model_params)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, batch_size, batch_size
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(self.model, params)
        self.memory = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch_size = batch_size

    def prefill(self, token_ids: list[int]) -> None:
        """Compute the tokens from an empty cache."""
        self.api.llama_memory_clear(self.memory, False)
        for start in range(0, len(token_ids), self.batch_size):
            self._decode(token_ids[start : start + self.batch_size])

    def decode(self, num_tokens: int) -> list[int]:
        """Go on greedily for `num_tokens` tokens."""
        token_ids = []
        for _ in range(num_tokens):
            pointer = self.api.llama_get_logits_ith(self.context, -1)
            token = int(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax())
            token_ids.append(token)
            self._decode([token])
        return token_ids

    def _decode(self, token_ids: list[int]) -> None:
        array = (self.api.llama_token * len(token_ids))(*token_ids)
        assert (
            self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(token_ids)))
            == 0
        )

    def close(self) -> None:
        """Free the context and the weights."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
