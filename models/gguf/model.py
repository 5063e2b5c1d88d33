"""GgufModel: a GGUF model over llama.cpp's low-level C API; weights, one context, one sequence."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.models.errors import ForwardError, ModelError, UnsupportedModel
from lowtide.models.files.fingerprint import file_fingerprint
from lowtide.models.gguf.buffers import reported_buffers
from lowtide.models.gguf.header.kind import llama_kind
from lowtide.models.gguf.llama_cpp import LlamaLibrary, in_background, llama_library
from lowtide.models.gguf.not_numbers import first_not_number
from lowtide.models.gguf.parameters import LoadOptions, context_parameters, model_parameters
from lowtide.models.gguf.sequences import BatchKernels, GgufSequences
from lowtide.models.gguf.state import (
    copy_kv,
    put_kv,
    read_state,
    require_tokens,
    snapshot_bytes,
    write_state,
)
from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.models.kind import require_decoder
from lowtide.models.logits import ADVICE, NOT_NUMBERS, are_numbers
from lowtide.models.model import Model, PassThreads, SequenceBatch
from lowtide.models.spec import KV_PADDING, ModelSpec

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

OBSERVED_TOKENS = 32
"""Tokens of a pass that looks for the layer without numbers."""
DECODE_ERRORS = {
    1: "the KV cache has no room for the tokens",
    2: "it was aborted",
    -1: "the batch is not valid",
}


class GraphKernels(BatchKernels, Protocol):
    """Attention kernels that run inside llama.cpp's graph and may keep data about KV slots."""

    def truncate(self, num_tokens: int) -> None:
        """Drop whatever is derived from KV slots at or beyond `num_tokens`."""


class KVPages(Protocol):
    """The memory pages of a context's KV cache (`memory/os/kv_pages.py`)."""

    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Release the pages behind the first `num_tokens` slots; `num_used` slots were written so far."""

    def release_pages(self, num_tokens: int) -> None:
        """Release every page behind the first `num_tokens` slots, however few they are."""


class TokenBatch:
    """llama.cpp's batch of one sequence, allocated once for passes of up to `batch_size` tokens."""

    def __init__(self, api: Any, batch_size: int) -> None:
        self._api = api
        self.struct = api.llama_batch_init(batch_size, 0, 1)
        for i in range(batch_size):
            self.struct.n_seq_id[i] = 1
            self.struct.seq_id[i][0] = 0

    def fill(self, token_ids: Sequence[int], position: int, *, all_logits: bool) -> None:
        """Fill in tokens at consecutive positions; request logits of all of them or of the last."""
        num_tokens = len(token_ids)
        struct = self.struct
        struct.n_tokens = num_tokens
        for i, token_id in enumerate(token_ids):
            struct.token[i] = token_id
            struct.pos[i] = position + i
            struct.logits[i] = all_logits or i == num_tokens - 1

    def free(self) -> None:
        """Free its memory."""
        self._api.llama_batch_free(self.struct)


class GgufModel(Model):
    """One llama.cpp model and context.

    `kernels` are lowtide's attention kernels in its graph. With `weights_of` the context uses the weights of
    that model, which must be closed later. Raises `UnsupportedModel` with llama.cpp's own reason where it
    refuses the file or the context.
    """

    supports_snapshot = supports_copy = True

    def __init__(
        self,
        spec: ModelSpec,
        options: LoadOptions,
        kernels: GraphKernels | None = None,
        weights_of: GgufModel | None = None,
    ) -> None:
        self.spec = spec
        self.batch_size = options.batch_size
        self.max_verify_batch = min(options.verify_batch, options.batch_size)
        self._options = options
        self.supports_batch = not spec.recurrent_state_bytes
        self._kernels = kernels
        self._pages: KVPages | None = None
        self._most_logits = 0  # of the largest pass so far
        self._threads: PassThreads | None = None
        self._num_threads = options.threads
        self._sequences: weakref.WeakSet[GgufSequences] = weakref.WeakSet()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._library = llama_library()
        if options.background:
            self._library = in_background(self._library)
        self._api = self._library.api
        self._owns_weights = weights_of is None
        self._has_logits = weights_of is None
        """A second context filters prompts: its passes end before the last layer."""
        try:
            if weights_of is not None:
                self._model, self.tokenizer = weights_of._model, weights_of.tokenizer
            else:
                with options.stage("weights"), self._library.collected_messages() as messages:
                    self._model = load_weights(self._library, spec, options)
                self.buffers = reported_buffers(messages)
                self.tokenizer = GgufTokenizer(
                    self._library, self._api.llama_model_get_vocab(self._model)
                )
            self.batch_truncates = not (
                self._api.llama_model_is_recurrent(self._model)
                or self._api.llama_model_is_hybrid(self._model)
            )
            with options.stage("context"), self._library.collected_messages() as messages:
                self._context = self._create_context(options)
            self.buffers += reported_buffers(messages)
            self._memory = self._api.llama_get_memory(self._context)
            require_decoder(spec, llama_kind(self._api, self._model, self._context))
            self._batch = TokenBatch(self._api, options.batch_size)
        except BaseException:
            self.close()
            raise
        self.context = min(options.context, int(self._api.llama_n_ctx(self._context)))
        self._num_tokens = 0
        self._num_written = 0
        """Slots that the last pass wrote, where those are more than tokens: branches of a draft tree."""
        self._num_logits = int(
            self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        )

    @property
    def handle(self) -> Any:
        """llama.cpp's model: its weights and its vocabulary."""
        return self._model

    def attach_pages(self, pages: KVPages) -> None:
        """Release pages of the KV cache through `pages` from now on; called before the first token."""
        self._pages = pages

    def attach_threads(self, threads: PassThreads) -> None:
        """Let `threads` choose the threads of each pass from now on."""
        self._threads = threads

    def set_threads(self, num_threads: int) -> None:
        """Let llama.cpp compute with so many threads from the next pass on, those of a batch, too."""
        self._api.llama_set_n_threads(self._context, num_threads, num_threads)
        self._num_threads = num_threads
        for sequences in self._sequences:
            sequences.set_threads(num_threads)

    def _create_context(self, options: LoadOptions) -> Any:
        params = context_parameters(self._api, options)
        return created(
            self._library,
            lambda: self._api.llama_init_from_model(self._model, params),
            f"a context of {options.context} tokens for {self.spec.name}",
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens in one llama.cpp batch and return the last token's logits."""
        import numpy as np

        self._compute(token_ids)
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self._num_logits,))
        self._require_numbers(logits, token_ids)
        return logits

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens in one llama.cpp batch and return every token's logits."""
        self._check_verify_batch(len(token_ids))
        self._compute(token_ids, all_logits=True)
        logits = self._all_logits(len(token_ids))
        self._require_numbers(logits, token_ids)
        return logits

    def _all_logits(self, num_tokens: int) -> Logits2D:
        import numpy as np

        self._most_logits = max(self._most_logits, num_tokens)
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(num_tokens, self._num_logits))

    def _require_numbers(self, logits: Logits | Logits2D, token_ids: Sequence[int]) -> None:
        """Raise `ForwardError` where the logits are not numbers; the pass is undone."""
        if not self._has_logits or are_numbers(logits):
            return
        self.truncate(max(self._num_tokens - len(token_ids), 0))
        raise self.not_numbers(token_ids)

    def not_numbers(self, token_ids: Sequence[int]) -> ForwardError:
        """Return the error of a pass over `token_ids` without numbers, with the first layer that has none.

        An observed pass over the first of the tokens finds it, where they suffice and no kernel of lowtide is needed.
        """
        place = None
        if not self.spec.repacked_tensors and not self._options.gpu_layers:
            num_tokens = min(len(token_ids), self.batch_size, OBSERVED_TOKENS)
            options = replace(
                self._options,
                context=min(KV_PADDING, self.context),
                batch_size=num_tokens,
                verify_batch=1,
                sequences=1,
                eval_callback=None,
            )
            params = context_parameters(self._api, options)
            place = first_not_number(self._library, self._model, params, token_ids[:num_tokens])
        first = f" (first at {place})" if place is not None else ""
        return ForwardError(f"{self.spec.path}: {NOT_NUMBERS}{first}; {ADVICE}")

    def _check_verify_batch(self, num_tokens: int) -> None:
        if num_tokens > self.max_verify_batch:
            raise ForwardError(
                f"logits of {num_tokens} tokens were requested; the plan allows {self.max_verify_batch}"
            )

    def _compute(self, token_ids: Sequence[int], *, all_logits: bool = False) -> None:
        self._check_tokens(token_ids)
        self._batch.fill(token_ids, self._num_tokens, all_logits=all_logits)
        if self._threads is not None:
            self._threads.begin_pass(len(token_ids), self._num_tokens)
        with self._library.collected_errors() as errors:
            code = self._library.decode(self._context, self._batch.struct)
        if code != 0:
            self._remove_from(self._num_tokens)
            reason = (
                errors[-1] if errors else DECODE_ERRORS.get(code, f"llama_decode returned {code}")
            )
            raise ForwardError(
                f"a forward pass of {len(token_ids)} tokens at {self._num_tokens} failed: {reason}"
            )
        self._num_tokens += len(token_ids)

    def require_first_pass(self) -> None:
        """Try a pass of one token in a process of its own, before the first one in this process.

        Raises `ForwardError` where native code fails there: ggml has no kernel for a tensor's type, for example.
        """
        self._check_tokens((0,))
        self._batch.fill((0,), self._num_tokens, all_logits=False)
        require_pass(self._library, self.spec, "llama_decode", self._context, self._batch.struct)

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        if self._context is None:
            raise ForwardError("the model is closed: open it again")
        self._library.broken.require_whole(self._context)
        if not 0 < len(token_ids) <= self.batch_size:
            raise ForwardError(
                f"a pass has {len(token_ids)} tokens; it must have 1 to {self.batch_size}"
            )
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
        """Drop the tokens from `num_tokens` on; everything, where the model cannot go back.

        This is the one place where llama.cpp's slots, the data that lowtide's kernels derived from them, and
        the memory pages behind them are released.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}; it must be 0 or more")
        num_used = max(self._num_written, self._num_tokens)
        self._num_tokens = self._remove_from(min(num_tokens, self._num_tokens))
        self._num_written = 0
        if self._kernels is not None:
            self._kernels.truncate(self._num_tokens)
        if self._pages is not None:
            self._pages.truncate(num_used, self._num_tokens)
        return self._num_tokens

    def release_pages(self) -> None:
        """Return the pages of the KV cache that hold no token to the system."""
        if self._pages is not None:
            self._pages.release_pages(self._num_tokens)

    def logits_beyond(self, num_rows: int) -> tuple[int, int] | None:
        """Return the part of llama.cpp's output behind the logits of the first `num_rows` tokens of a pass."""
        if self._options.gpu_layers or self._context is None:
            return None
        if self._most_logits <= num_rows:
            return 0, 0
        address = ctypes.addressof(self._api.llama_get_logits(self._context).contents)
        row_bytes = 4 * self._num_logits
        return address + num_rows * row_bytes, (self._most_logits - num_rows) * row_bytes

    def snapshot_properties(self) -> dict[str, str]:
        """Return the weights, the KV type, and the version of llama.cpp, which defines the layout."""
        spec = self.spec
        weights = file_fingerprint(spec.paths)
        return {
            "model": f"{spec.name}, {spec.quantisation}, {weights}",
            "KV type": self._options.kv_type,
            "llama-cpp-python": self._library.version,
        }

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache to a file in llama.cpp's format, one tensor at a time."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_state(self._library, self._context, path, token_ids)

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Read the tokens, keys and values of a file; slots without a token stay untouched."""
        self.truncate(0)
        require_tokens(self._library, path, num_bytes, num_tokens, self._num_logits)
        try:
            token_ids = read_state(self._library, self._context, path, num_bytes, self.context)
        except BaseException:
            self._remove_from(0)
            raise
        self._num_tokens = len(token_ids)
        return token_ids

    def snapshot_bytes(self) -> int:
        """Return the bytes of the slots that hold tokens, and of llama.cpp's metadata."""
        return snapshot_bytes(self._library, self._context)

    def copy_kv(self, into: memoryview) -> None:
        """Copy the slots that hold tokens, one tensor at a time."""
        copy_kv(self._library, self._context, into)

    def put_kv(self, snapshot: memoryview, num_tokens: int) -> None:
        """Put the slots back; those without a token stay untouched."""
        self.truncate(0)
        try:
            put_kv(self._library, self._context, snapshot, num_tokens)
        except BaseException:
            self._remove_from(0)
            raise
        self._num_tokens = num_tokens

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> SequenceBatch:
        """Make another context; llama.cpp clears every slot, so that all of it is resident."""
        if not self.supports_batch:
            return super().open_sequences(num_sequences, num_slots)
        max_logits = max_logits or num_sequences
        options = replace(
            self._options,
            context=num_slots,
            verify_batch=max_logits,
            sequences=num_sequences,
            stage=nullcontext,
        )
        opened = GgufSequences(
            self._library,
            self._create_context(options),
            num_sequences=num_sequences,
            batch_size=self.batch_size,
            max_logits=max_logits,
            vocabulary_size=self._num_logits,
            kernels=self._kernels,
            not_numbers=self.not_numbers,
            threads=self._threads,
        )
        opened.set_threads(self._num_threads)
        self._sequences.add(opened)
        return opened

    def _remove_from(self, position: int) -> int:
        """Remove every slot from `position` on, also those of an interrupted pass; return what remains."""
        if position > 0 and self._api.llama_memory_seq_rm(self._memory, 0, position, -1):
            return position
        self._api.llama_memory_clear(self._memory, False)
        return 0

    def close(self) -> None:
        """Free the context, and the weights unless they are another model's."""
        self._kernels = self._pages = None
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        if self._batch is not None:
            self._batch.free()
            self._batch = None
        if self._context is not None:
            self._library.free_context(self._context)
            self._context = None
        if self._model is not None and self._owns_weights:
            self._library.free_weights(self._model)
        self._model = None


def load_weights(library: LlamaLibrary, spec: ModelSpec, options: LoadOptions) -> Any:
    """Return llama.cpp's model; raise `ModelError` with its reason where it cannot load the file."""
    params = model_parameters(
        library.api,
        memory_map=options.memory_map,
        repack=options.repack and library.repacks,
        gpu_layers=options.gpu_layers,
        gpu_attention=options.gpu_attention,
    )
    path = os.fsencode(spec.path)
    return created(
        library,
        lambda: library.api.llama_model_load_from_file(path, params),
        f"{spec.path} ({spec.architecture})",
    )


def require_pass(
    library: LlamaLibrary, spec: ModelSpec, function: str, context: Any, batch: Any
) -> None:
    """Try a pass of `function` in a process of its own; raise `ForwardError` where native code fails there."""
    refuse_first_pass(library, spec, library.try_pass(function, context, batch))


def refuse_first_pass(library: LlamaLibrary, spec: ModelSpec, reason: str | None) -> None:
    """Raise `ForwardError` for a first pass that failed for `reason`; None: it did not fail."""
    if reason is None:
        return
    named, *others = spec.unusual_tensors
    more = f" and {len(others)} more" if others else ""
    raise ForwardError(
        f"llama.cpp {library.version} cannot compute {spec.path}: {reason}; its tensor {named}{more} has a type that "
        "is unusual there: take another conversion of the model"
    )


def created(library: LlamaLibrary, create: Callable[[], Any], what: str) -> Any:
    """Return what `create` makes; raise `ModelError` with llama.cpp's reason where it makes nothing."""
    with library.collected_errors() as errors:
        handle = create()
        if handle:
            return handle
        reason = next((e for e in errors if "unknown model architecture" in e), None)
        if reason is not None:
            raise UnsupportedModel(
                f"llama.cpp {library.version} cannot run {what}: {reason}; pick another model"
            )
        detail = errors[0] if errors else "no reason given"
        raise ModelError(
            f"llama.cpp cannot create {what}: {detail}; if the file is whole, download another conversion of the model"
        )
