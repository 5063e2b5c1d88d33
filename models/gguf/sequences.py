"""GgufSequences: several sequences in a context of their own, on the weights of a model that is loaded.

llama.cpp's sequence ids say whose a cell is: one that all share has all of them. It puts each token into
the lowest cell that is free; where it does otherwise, our attention notices and counts it. Knows no budget.

FreeSlots: which cells of a cache hold no token. Knows no llama.cpp and no token."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.model import SequenceBatch, SequenceSlice, SequenceSlots

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


class FreeSlots:
    """Hands out the cells 0 to `num_cells` - 1, always the lowest that is free."""

    def __init__(self, num_cells: int) -> None:
        self._num_cells = num_cells
        self._untouched = 0
        """The lowest cell that was never handed out."""
        self._given_back: list[int] = []

    def __len__(self) -> int:
        """Return how many are free."""
        return self._num_cells - self._untouched + len(self._given_back)

    def take(self) -> int:
        """Return the lowest free cell, which is free no longer; raises `IndexError` where none is."""
        if self._given_back:
            return heappop(self._given_back)
        if self._untouched == self._num_cells:
            raise IndexError("no cell is free")
        self._untouched += 1
        return self._untouched - 1

    def release_pages(self, cells: Iterable[int]) -> None:
        """Take back cells that were handed out."""
        for cell in cells:
            heappush(self._given_back, cell)


class GgufSequences(SequenceBatch):
    """Takes `context` over, made for these sequences, and frees it; a row has `vocabulary_size` logits."""

    def __init__(
        self,
        library: LlamaLibrary,
        context: Any,
        *,
        num_sequences: int,
        batch_size: int,
        max_logits: int,
        vocabulary_size: int,
    ) -> None:
        self.num_sequences = num_sequences
        self.batch_size, self.max_logits = batch_size, max_logits
        self.before_pass: Callable[[SequenceSlots], None] | None = None
        """Told before each pass where the keys of its parts lie."""
        self._library = library
        self._api = library.api
        self._context: Any = context
        self._vocabulary_size = vocabulary_size
        self.num_cells = int(self._api.llama_n_ctx(context))
        self._memory = self._api.llama_get_memory(context)
        self._free = FreeSlots(self.num_cells)
        self._num_shared = 0
        self._own = [array("i") for _ in range(num_sequences)]
        self._batch: Any = self._api.llama_batch_init(batch_size, 0, 1)

    def share(self) -> None:
        """Give every cell all sequence ids."""
        assert not any(self._own[1:]), "another sequence has tokens"
        for sequence in range(1, self.num_sequences):
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self._num_shared, self._own[0] = len(self._own[0]), array("i")

    def forward(self, parts: Sequence[SequenceSlice]) -> Logits2D:
        """Append the parts in one llama.cpp batch."""
        import numpy as np

        num_rows = sum(len(part.token_ids) for part in parts)
        self._check(parts, num_rows)
        self._fill(parts)
        if self.before_pass is not None:
            self.before_pass(
                SequenceSlots(
                    num_shared=self._num_shared,
                    num_rows=tuple(len(part.token_ids) for part in parts),
                    own=tuple(self._own[part.sequence] for part in parts),
                )
            )
        with self._library.collected_errors() as errors:
            code = self._api.llama_decode(self._context, self._batch)
        if code != 0:
            reason = errors[-1] if errors else f"llama.cpp says {code}"
            raise ForwardError(
                f"a forward pass over {num_rows} rows of {len(parts)} sequences failed: {reason}"
            )
        wanted = sum(part.num_logits for part in parts)
        if not wanted:
            return np.empty((0, self._vocabulary_size), np.float32)
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(wanted, self._vocabulary_size))

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Have llama.cpp forget the tokens; it fills their cells with those that come next."""
        if self._context is None:
            raise ForwardError("the sequences are closed")
        own, kept = self._own[sequence], max(num_tokens - self._num_shared, 0)
        if kept >= len(own):
            return
        position = self._num_shared + kept
        if not self._api.llama_memory_seq_rm(self._memory, sequence, position, -1):
            raise ForwardError(f"llama.cpp cannot forget a sequence's tokens from {position} on")
        self._free.release_pages(own[kept:])
        del own[kept:]

    def rows_agree(self) -> bool:
        """Compute a row alone and beside the others; what is in the cells does not matter after that."""
        assert len(self._free) == self.num_cells, "there are tokens"
        last = self.num_sequences - 1
        alone = self.forward([SequenceSlice(last, [last % 251])])[0].copy()
        self._forget()
        parts = [SequenceSlice(i, [i % 251]) for i in range(self.num_sequences)]
        together = self.forward(parts)[-1]
        agree = bool((alone == together).all())
        self._forget()
        return agree

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._memory, False)
        self._free = FreeSlots(self.num_cells)
        self._own = [array("i") for _ in range(self.num_sequences)]

    def _check(self, parts: Sequence[SequenceSlice], num_rows: int) -> None:
        if self._context is None:
            raise ForwardError("the sequences are closed")
        if not 0 < num_rows <= self.batch_size or not all(part.token_ids for part in parts):
            raise ForwardError(f"{num_rows} rows given, 1 to {self.batch_size} are allowed")
        if num_rows > len(self._free):
            raise ForwardError(
                f"{num_rows} tokens do not fit the cache: {len(self._free)} of {self.num_cells} cells are "
                "free"
            )
        wanted = sum(part.num_logits for part in parts)
        if wanted > self.max_logits or any(
            not 0 <= part.num_logits <= len(part.token_ids) for part in parts
        ):
            raise ForwardError(
                f"logits of {wanted} rows of {num_rows} are wanted, {self.max_logits} are planned"
            )
        tokens = [token_id for part in parts for token_id in part.token_ids]
        if min(tokens) < 0 or max(tokens) >= self._vocabulary_size:
            raise ForwardError(
                f"token {max(tokens, key=abs)} is not in the vocabulary of {self._vocabulary_size}"
            )

    def _fill(self, parts: Sequence[SequenceSlice]) -> None:
        batch, row = self._batch, 0
        for part in parts:
            own = self._own[part.sequence]
            first_wanted = row + len(part.token_ids) - part.num_logits
            for token_id in part.token_ids:
                batch.token[row] = token_id
                batch.pos[row] = self._num_shared + len(own)
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = part.sequence
                batch.logits[row] = row >= first_wanted
                own.append(self._free.take())
                row += 1
        batch.n_tokens = row

    def close(self) -> None:
        """Free the context."""
        self.before_pass = None
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
