"""A GGUF model over llama.cpp's low-level C API: weights, one context, one sequence.

Knows no budget: what to allocate is decided by whoever fills `LoadOptions`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError, ModelError, UnsupportedModel
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.gguf_batch import RowBatch
from lowtide.models.gguf_options import LoadOptions, context_parameters, model_parameters
from lowtide.models.gguf_sequences import GgufSequences
from lowtide.models.gguf_state import (
    copy_state,
    put_state,
    read_state,
    require_tokens,
    state_bytes,
    write_state,
)
from lowtide.models.gguf_tokenizer import GgufTokenizer
from lowtide.models.llama_library import LlamaLibrary, llama_library
from lowtide.models.model import Model
from lowtide.models.sequences import Sequences
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.models.model import Logits, RowLogits

DECODE_ERRORS = {
    1: "the KV cache has no room for the rows",
    2: "it was aborted",
    -1: "the rows are not valid",
}


class GgufModel(Model):
    """One llama.cpp model and context; `weights_of` another one, which is closed later, it takes those.

    Raises `UnsupportedModel` where llama.cpp refuses the file or the context, with its own reason.
    """

    keeps_state = copies_state = True

    def __init__(
        self, spec: ModelSpec, options: LoadOptions, weights_of: GgufModel | None = None
    ) -> None:
        self.spec = spec
        self.max_rows = options.max_rows
        self.max_verified_rows = min(options.verified_rows, options.max_rows)
        self._options = options
        self.keeps_sequences = not spec.recurrent_state_bytes and not options.gpu_layers
        self.on_cut: Callable[[int, int], None] | None = None
        """Told, after tokens were forgotten, how many there had been and how many are kept."""
        self.least_tokens: Callable[[], int] = lambda: 0
        """Fewer tokens than these cannot be gone back to: everything is forgotten then."""
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._library = llama_library()
        self._api = self._library.api
        self._owns_weights = weights_of is None
        try:
            if weights_of is not None:
                self._model, self.tokenizer = weights_of._model, weights_of.tokenizer
            else:
                with options.stage("weights"):
                    self._model = _load_weights(self._library, spec, options)
                self.tokenizer = GgufTokenizer(
                    self._library, self._api.llama_model_get_vocab(self._model)
                )
            with options.stage("context"):
                self._context = self._create_context(options)
            self._memory = self._api.llama_get_memory(self._context)
            self._batch = RowBatch(self._api, options.max_rows)
        except BaseException:
            self.close()
            raise
        self.context = min(options.context, int(self._api.llama_n_ctx(self._context)))
        self._num_tokens = 0
        self._num_logits = int(
            self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        )

    def _create_context(self, options: LoadOptions) -> Any:
        params = context_parameters(self._api, options)
        return _created(
            self._library,
            lambda: self._api.llama_init_from_model(self._model, params),
            f"a context of {options.context} tokens for {self.spec.name}",
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens in one llama.cpp batch and return the last row's logits."""
        import numpy as np

        self._compute(token_ids)
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._num_logits,))

    def forward_rows(self, token_ids: Sequence[int]) -> RowLogits:
        """Append the tokens in one llama.cpp batch and return every row's logits."""
        self._check_verified(len(token_ids))
        self._compute(token_ids, every_row=True)
        return self._row_logits(len(token_ids))

    def _row_logits(self, num_rows: int) -> RowLogits:
        import numpy as np

        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(num_rows, self._num_logits))

    def _check_verified(self, num_rows: int) -> None:
        if num_rows > self.max_verified_rows:
            raise ForwardError(
                f"logits of {num_rows} rows are wanted, {self.max_verified_rows} are planned"
            )

    def _compute(self, token_ids: Sequence[int], *, every_row: bool = False) -> None:
        self._check_rows(token_ids)
        self._batch.fill(token_ids, self._num_tokens, every_row=every_row)
        with self._library.collected_errors() as errors:
            code = self._api.llama_decode(self._context, self._batch.struct)
        if code != 0:
            self._forget_from(self._num_tokens)
            reason = errors[-1] if errors else DECODE_ERRORS.get(code, f"llama.cpp says {code}")
            raise ForwardError(
                f"a forward pass over {len(token_ids)} rows at {self._num_tokens} failed: {reason}"
            )
        self._num_tokens += len(token_ids)

    def _check_rows(self, token_ids: Sequence[int]) -> None:
        if self._context is None:
            raise ForwardError("the model is closed: open it again")
        if not 0 < len(token_ids) <= self.max_rows:
            raise ForwardError(f"{len(token_ids)} rows given, 1 to {self.max_rows} are allowed")
        if self._num_tokens + len(token_ids) > self.context:
            raise ForwardError(
                f"{self._num_tokens + len(token_ids)} tokens do not fit the context of "
                f"{self.context}: truncate first"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._num_logits:
            raise ForwardError(
                f"token {max(token_ids, key=abs)} is not in the vocabulary of {self._num_logits}"
            )

    def truncate(self, num_tokens: int) -> int:
        """Forget the tokens from `num_tokens` on; everything, where the model cannot go back."""
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}, 0 or more is wanted")
        kept = min(num_tokens, self._num_tokens)
        kept = kept if kept >= self.least_tokens() else 0
        used, self._num_tokens = self._num_tokens, self._forget_from(kept)
        if self.on_cut is not None:
            self.on_cut(used, self._num_tokens)
        return self._num_tokens

    def state_owner(self) -> dict[str, str]:
        """Return the weights, the KV type, and the llama.cpp that lays the cells out."""
        spec = self.spec
        weights = file_fingerprint(spec.paths)
        return {
            "model": f"{spec.name}, {spec.quantisation}, {weights}",
            "KV type": self._options.kv_type,
            "llama-cpp-python": self._library.version,
        }

    def save_state(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache to a file in llama.cpp's format, one tensor at a time."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_state(self._library, self._context, path, token_ids)

    def load_state(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put a file's tokens and cells back; cells that hold no token stay untouched."""
        self.truncate(0)
        require_tokens(self._library, path, num_bytes, num_tokens, self._num_logits)
        try:
            token_ids = read_state(self._library, self._context, path, num_bytes, self.context)
        except BaseException:
            self._forget_from(0)
            raise
        self._num_tokens = len(token_ids)
        return token_ids

    def state_bytes(self) -> int:
        """Return the bytes of the cells that hold tokens, and of llama.cpp's notes on them."""
        return state_bytes(self._library, self._context)

    def copy_state(self, into: memoryview) -> None:
        """Copy the cells that hold tokens, a tensor at a time."""
        copy_state(self._library, self._context, into)

    def put_state(self, state: memoryview, num_tokens: int) -> None:
        """Put the cells back; those that hold no token stay untouched."""
        self.truncate(0)
        try:
            put_state(self._library, self._context, state, num_tokens)
        except BaseException:
            self._forget_from(0)
            raise
        self._num_tokens = num_tokens

    def open_sequences(
        self, num_sequences: int, num_cells: int, max_wanted: int | None = None
    ) -> Sequences:
        """Make another context, of which every cell is cleared, so that all of it is resident."""
        if not self.keeps_sequences:
            return super().open_sequences(num_sequences, num_cells)
        wanted = max(max_wanted or 0, num_sequences)
        options = replace(
            self._options,
            context=num_cells,
            verified_rows=wanted,
            sequences=num_sequences,
            stage=nullcontext,
        )
        return GgufSequences(
            self._library,
            self._create_context(options),
            num_sequences=num_sequences,
            max_rows=self.max_rows,
            max_wanted=wanted,
            vocabulary_size=self._num_logits,
        )

    def _forget_from(self, position: int) -> int:
        """Remove every cell from `position` on, also those of a pass that was interrupted."""
        if position > 0 and self._api.llama_memory_seq_rm(self._memory, 0, position, -1):
            return position
        self._api.llama_memory_clear(self._memory, False)
        return 0

    def close(self) -> None:
        """Free the context, and the weights where they are its own."""
        self.on_cut, self.least_tokens = None, lambda: 0
        if self._batch is not None:
            self._batch.free()
            self._batch = None
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None and self._owns_weights:
            self._api.llama_model_free(self._model)
        self._model = None


def _load_weights(library: LlamaLibrary, spec: ModelSpec, options: LoadOptions) -> Any:
    params = model_parameters(
        library.api,
        memory_map=options.memory_map,
        repack=options.repack and library.repacks,
        gpu_layers=options.gpu_layers,
        gpu_attention=options.gpu_attention,
    )
    path = os.fsencode(spec.path)
    return _created(
        library,
        lambda: library.api.llama_model_load_from_file(path, params),
        f"{spec.path} ({spec.architecture})",
    )


def _created(library: LlamaLibrary, create: Callable[[], Any], what: str) -> Any:
    with library.collected_errors() as errors:
        made = create()
        if made:
            return made
        reason = next((e for e in errors if "unknown model architecture" in e), None)
        if reason is not None:
            raise UnsupportedModel(
                f"llama.cpp {library.version} cannot run {what}: {reason.split(': ', 1)[-1]}; "
                "upgrade llama-cpp-python or pick another model"
            )
        detail = errors[0] if errors else "no reason given"
        raise ModelError(f"llama.cpp cannot make {what}: {detail}")
