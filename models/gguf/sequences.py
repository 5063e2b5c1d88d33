"""GgufSequences: several sequences in a llama.cpp context of their own, on the weights of a loaded model.

llama.cpp tags every KV slot with the ids of its sequences; a shared slot has several. It puts each token into the
lowest free slot. `SlotTable` predicts which one that is, so that lowtide's attention reads only the slots of a
sequence; where the prediction fails, the kernels notice and count it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.models.errors import ForwardError
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.logits import NOT_NUMBERS, are_numbers
from lowtide.models.model import PassThreads, SequenceBatch, SequenceSlice, SequenceSlots
from lowtide.models.sequence_slots import SlotTable

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


CHUNK_KEYS = 256
"""Keys of a chunk (`kChunkKeys` in attention/native/attention/problem.h)."""


class BatchKernels(Protocol):
    """Attention kernels that can attend to the slots of each sequence alone."""

    @property
    def layouts_refused(self) -> int:
        """How many passes had slots that differed from the layout that was set."""

    def set_batch_layout(self, slots: SequenceSlots | None) -> None:
        """Set the slots of the next pass's slices; None: passes have one sequence again."""

    def copy_slot(self, source: int, target: int) -> int:
        """Copy a slot's keys and values over another's in every layer; return the number of layers."""


class GgufSequences(SequenceBatch):
    """Sequences in `context`, a llama.cpp context made for them, which `close` frees.

    `kernels`, if not None, compute its attention; each pass sets its slots in them. `not_numbers` makes the error of a
    pass over tokens whose logits are not numbers. `threads` chooses the threads of each pass.
    """

    def __init__(
        self,
        library: LlamaLibrary,
        context: Any,
        *,
        num_sequences: int,
        batch_size: int,
        max_logits: int,
        vocabulary_size: int,
        kernels: BatchKernels | None = None,
        not_numbers: Callable[[Sequence[int]], ForwardError] = lambda _: ForwardError(NOT_NUMBERS),
        threads: PassThreads | None = None,
    ) -> None:
        self._threads = threads
        self._not_numbers = not_numbers
        self.num_sequences = num_sequences
        self.batch_size, self.max_logits = batch_size, max_logits
        self._kernels = kernels
        self._library = library
        self._api = library.api
        self._context: Any = context
        self._vocabulary_size = vocabulary_size
        self.num_slots = int(self._api.llama_n_ctx(context))
        self._memory = self._api.llama_get_memory(context)
        self._table = SlotTable(num_sequences, self.num_slots)
        self._batch: Any = self._api.llama_batch_init(batch_size, 0, 1)

    def set_threads(self, num_threads: int) -> None:
        """Let llama.cpp compute with so many threads from the next pass on."""
        if self._context is not None:
            self._api.llama_set_n_threads(self._context, num_threads, num_threads)

    @property
    def num_free(self) -> int:
        """How many slots no sequence holds."""
        return self._table.num_free

    def num_held(self, sequences: Iterable[int], sequence: int, num_tokens: int) -> int:
        """Return how many slots these sequences hold together with the first tokens of another one."""
        return self._table.num_held(sequences, sequence, num_tokens)

    def neighbours(self, sequence: int) -> Sequence[int]:
        """Return the slots at the ends of the chunks that lowtide's attention reads once for several sequences."""
        return self._table.slots(sequence)[CHUNK_KEYS - 1 :: CHUNK_KEYS]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Tag the slots of the source's first tokens with the target's id, too."""
        self._table.copy_prefix(source, target, num_tokens)
        self._api.llama_memory_seq_cp(self._memory, source, target, 0, num_tokens)

    def forward(self, slices: Sequence[SequenceSlice]) -> Logits2D:
        """Append the slices in one llama.cpp batch."""
        import numpy as np

        num_tokens = sum(len(part.token_ids) for part in slices)
        self._check(slices, num_tokens)
        self._fill(slices)
        if self._threads is not None:
            self._threads.begin_pass(num_tokens, self.num_slots - self.num_free - num_tokens)
        with self._layout(slices), self._library.collected_errors() as errors:
            code = self._library.decode(self._context, self._batch)
        if code != 0:
            reason = errors[-1] if errors else f"llama_decode returned {code}"
            raise ForwardError(
                f"a forward pass of {num_tokens} tokens of {len(slices)} sequences failed: {reason}"
            )
        num_logits = sum(part.num_logits for part in slices)
        if not num_logits:
            return np.empty((0, self._vocabulary_size), np.float32)
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(num_logits, self._vocabulary_size))

    @contextlib.contextmanager
    def _layout(self, slices: Sequence[SequenceSlice]) -> Iterator[None]:
        """Have the kernels attend to the slots of each slice's sequence, for one pass."""
        if self._kernels is None:
            yield
            return
        slots = SequenceSlots(
            num_shared=0,
            num_rows=tuple(len(part.token_ids) for part in slices),
            own=tuple(self._table.slots(part.sequence) for part in slices),
        )
        self._kernels.set_batch_layout(slots)
        try:
            yield
        finally:
            self._kernels.set_batch_layout(None)  # the next pass may be the model's own

    def failure(self, logits: Logits2D, token_ids: Sequence[int]) -> ForwardError | None:
        """Return an error for logits that are not numbers, with the layer where that began."""
        return None if are_numbers(logits) else self._not_numbers(token_ids)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drop a sequence's tokens from `num_tokens` on; llama.cpp reuses their slots."""
        if self._context is None:
            raise ForwardError("the sequences are closed")
        if num_tokens >= len(self._table.slots(sequence)):
            return
        if not self._api.llama_memory_seq_rm(self._memory, sequence, num_tokens, -1):
            raise ForwardError(f"llama.cpp cannot drop a sequence's tokens from {num_tokens} on")
        self._table.truncate(sequence, num_tokens)

    def rows_agree(self) -> bool:
        """Compute a token alone and beside the other sequences', and compare the logits."""
        assert self.num_free == self.num_slots, "the sequences hold tokens"
        num_sequences = min(self.num_sequences, self.max_logits)
        last = num_sequences - 1
        alone = self.forward([SequenceSlice(last, [last % 251])])[0].copy()
        self.clear()
        slices = [SequenceSlice(i, [i % 251]) for i in range(num_sequences)]
        together = self.forward(slices)[-1]
        agree = bool((alone == together).all())
        self.clear()
        return agree

    def clear(self) -> None:
        """Drop all tokens of all sequences."""
        self._api.llama_memory_clear(self._memory, False)
        self._table = SlotTable(self.num_sequences, self.num_slots)

    def _check(self, slices: Sequence[SequenceSlice], num_tokens: int) -> None:
        if self._context is None:
            raise ForwardError("the sequences are closed")
        if not 0 < num_tokens <= self.batch_size or not all(part.token_ids for part in slices):
            raise ForwardError(
                f"a pass has {num_tokens} tokens; it must have 1 to {self.batch_size}"
            )
        if num_tokens > self.num_free:
            raise ForwardError(
                f"{num_tokens} tokens do not fit the KV cache: {self.num_free} of {self.num_slots} slots "
                "are free"
            )
        num_logits = sum(part.num_logits for part in slices)
        if num_logits > self.max_logits or any(
            not 0 <= part.num_logits <= len(part.token_ids) for part in slices
        ):
            raise ForwardError(
                f"logits of {num_logits} of {num_tokens} tokens were requested; the plan allows "
                f"{self.max_logits}"
            )
        tokens = [token_id for part in slices for token_id in part.token_ids]
        if min(tokens) < 0 or max(tokens) >= self._vocabulary_size:
            raise ForwardError(
                f"token {max(tokens, key=abs)} is not in the vocabulary of {self._vocabulary_size}"
            )

    def _fill(self, slices: Sequence[SequenceSlice]) -> None:
        batch, i = self._batch, 0
        for part in slices:
            position = len(self._table.slots(part.sequence))
            self._table.append(part.sequence, len(part.token_ids))
            first_with_logits = i + len(part.token_ids) - part.num_logits
            for offset, token_id in enumerate(part.token_ids):
                batch.token[i] = token_id
                batch.pos[i] = position + offset
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = part.sequence
                batch.logits[i] = i >= first_with_logits
                i += 1
        batch.n_tokens = i

    def close(self) -> None:
        """Free the context."""
        self._kernels = None
        if self._threads is not None and self._context is not None:
            self._threads.settle()
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        if self._context is not None:
            self._library.free_context(self._context)
            self._context = None
