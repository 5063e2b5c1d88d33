"""Model: the one seam between a runtime and whatever computes.

Knows no budget, no policy and no sampling. `GgufModel` and `FakeModel` implement it.

Sequences: several sequences of tokens in one KV cache, which go through a model together.

Knows no text and no sampling. `GgufSequences` and `FakeSequences` implement it.

SingleSequence: the first of several sequences, as a model has its only one: passes are measured so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import ForwardError, SnapshotError, UnsupportedModel
from lowtide.models.spec import ModelSpec
from lowtide.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits: TypeAlias = NDArray[np.float32]
    Logits2D: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """Tokens that go in at the end of a sequence; the logits of the last `num_logits` are wanted."""

    sequence: int
    token_ids: Sequence[int]
    num_logits: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlots:
    """Where the keys of a pass's parts lie, once it is computed, in the order of their tokens.

    Every part sees the first `num_shared` cells; part i has `num_rows[i]` rows, one after the other, and
    sees the cells `own[i]`, too.
    """

    num_shared: int
    num_rows: tuple[int, ...]
    own: tuple[array[int], ...]


class SequenceBatch(ABC):
    """`num_sequences` sequences in a cache of `num_cells` tokens, of which `batch_size` go in at once.

    The logits of `max_logits` rows of a pass come out. What the first sequence holds when `share` is called
    is the beginning of all of them, and lies there once. Close it before the model that it is of.
    """

    num_sequences: int
    num_cells: int
    batch_size: int
    max_logits: int

    @abstractmethod
    def share(self) -> None:
        """Have all sequences begin with what the first holds; called once, before any other has tokens."""

    @abstractmethod
    def forward(self, parts: Sequence[SequenceSlice]) -> Logits2D:
        """Append each part to its sequence, in one pass; a sequence has one part at most.

        Returns the logits of the rows that are wanted, in order, shape (those rows, vocabulary): a view
        that the next call overwrites. Raises `ForwardError` where native code fails; the sequences are
        of no use then.
        """

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forget a sequence's tokens from `num_tokens` on, but for shared ones; their cells are used again.

        Truncating and appending again equals never having appended.
        """

    def rows_agree(self) -> bool:
        """Whether a row beside those of the other sequences is bit for bit what it is alone, by trying.

        Called before there are tokens; there are none after it.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Closing twice is allowed."""


class Model(ABC):
    """A loaded model with one sequence of tokens in its KV cache.

    Rows go in at the end of the sequence; `truncate` takes them off again. Truncating and appending
    again must equal never having appended.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    context: int
    """How many tokens the KV cache holds."""
    batch_size: int
    """How many rows one forward pass takes."""
    max_verify_batch: int = 1
    """How many rows `forward_rows` takes: it returns the logits of each."""
    supports_snapshot: bool = False
    """Whether the KV cache can be written to a file and read again: the three methods on state."""
    supports_copy: bool = False
    """Whether it can be copied into memory and put back: `state_bytes`, `copy_kv`, `put_kv`."""

    verifies_trees: bool = False
    """Whether `forward_tree` takes branches beside the trunk."""
    supports_batch: bool = False
    """Whether several sequences can go through it together: `open_sequences`."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""

    @abstractmethod
    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last row, shape (vocabulary,).

        The array is a view that the next call overwrites. At most `batch_size` tokens go in at once.
        Raises `ForwardError` where native code fails; the cache is then as it was before.
        """

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens as `forward` does; return the logits of every row, shape (rows, vocabulary).

        At most `max_verify_batch` tokens go in at once.
        """
        if len(token_ids) != 1:
            raise ForwardError(
                f"{self.spec.name} computes the logits of one row, not {len(token_ids)}"
            )
        return self.forward(token_ids)[None]

    def forward_tree(self, tree: TokenTree) -> Logits2D:
        """Append a tree's trunk, which comes first in it; return the logits of rows, (rows, vocabulary).

        Those are the first rows of the tree: all of them, or the trunk's, where branches could not be
        computed. At most `max_verify_batch` tokens go in at once.
        """
        return self.forward_rows(tree.token_ids[: tree.trunk_rows])

    def adopt(self, row: int) -> None:
        """Have a row of the last `forward_tree` be the token at its depth.

        Of a path, each row in turn, from the text on, before anything else goes in.
        """
        return None

    @abstractmethod
    def truncate(self, num_tokens: int) -> int:
        """Forget every token from position `num_tokens` on and return how many are kept.

        A model that cannot go back (a recurrent one) forgets everything and returns 0.
        """

    def snapshot_component(self) -> dict[str, str]:
        """Return whose keys and values a state holds, by property: another model's must differ in one."""
        raise SnapshotError(f"{self.spec.name} cannot keep its KV cache in a file")

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache of `token_ids`, all that it holds, to a file and return its bytes.

        Raises `SnapshotError` with the reason, such as a full disk.
        """
        raise SnapshotError(f"{self.spec.name} cannot keep its KV cache in a file")

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put back what lies in the first `num_bytes` of a file, and return its tokens, `num_tokens`.

        Going on from there equals never having left. The bytes must be those that `save_kv` of this
        `snapshot_component` wrote. Raises `SnapshotError` where they are not; the cache is then empty.
        """
        raise SnapshotError(f"{self.spec.name} cannot keep its KV cache in a file")

    def state_bytes(self) -> int:
        """Return how many bytes a copy of the KV cache takes as it is now."""
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def copy_kv(self, into: memoryview) -> None:
        """Copy the KV cache into `state_bytes` bytes that can be written; no other copy is made.

        Raises `SnapshotError` where they are not enough; what they hold is no state then.
        """
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def put_kv(self, state: memoryview, num_tokens: int) -> None:
        """Be where this model was when `copy_kv` took the state of `num_tokens`.

        Going on from there equals never having left. Raises `SnapshotError` where it is no such state; the
        cache is then empty.
        """
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def open_sequences(
        self, num_sequences: int, num_cells: int, max_logits: int | None = None
    ) -> SequenceBatch:
        """Return a cache of `num_cells` tokens for several sequences; this model's own stays as it is.

        Logits of `max_logits` rows of a pass come out, of one a sequence in any case. Raises `ModelError`
        where it cannot be made.
        """
        raise UnsupportedModel(
            f"several sequences at once are wanted, {self.spec.name} computes one: ask one after another"
        )

    @abstractmethod
    def close(self) -> None:
        """Give everything back; further calls are errors. Closing twice is allowed."""

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SingleSequence:
    """Appends to the first sequence, and takes off again; `sequences` hold no tokens before and after."""

    def __init__(self, sequences: SequenceBatch) -> None:
        self._sequences = sequences

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last row, shape (vocabulary,)."""
        row: Logits = self._sequences.forward([SequenceSlice(0, token_ids)])[0]
        return row

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens and return the logits of every row, shape (rows, vocabulary)."""
        return self._sequences.forward([SequenceSlice(0, token_ids, num_logits=len(token_ids))])

    def truncate(self, num_tokens: int) -> None:
        """Forget every token from position `num_tokens` on."""
        self._sequences.truncate(0, num_tokens)
