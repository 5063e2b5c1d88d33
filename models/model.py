"""Model: the interface between the runtime and whatever computes a language model.

`GgufModel` (llama.cpp), `OnnxModel` (onnxruntime) and `FakeModel` implement it, and so may a user's own
class. A model has one sequence of tokens in its KV cache; `SequenceBatch` has several, in a cache of their
own. The KV verbs are the same everywhere: `truncate`, `clear`, `release_pages`, `close`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import ForwardError, SnapshotError, UnsupportedModel
from lowtide.models.spec import ModelSpec
from lowtide.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.models.gguf.buffers import Buffer

    Logits: TypeAlias = NDArray[np.float32]
    Logits2D: TypeAlias = NDArray[np.float32]


class PassThreads(Protocol):
    """Who chooses the threads of each pass (`runtime/backends/threads.py`)."""

    def begin_pass(self, num_tokens: int, num_cached: int) -> None:
        """Set the threads for a pass of `num_tokens` behind `num_cached` others in the cache."""

    def settle(self) -> None:
        """Wait until no thread reads memory of earlier passes, so that it can be freed."""

    def close(self) -> None:
        """Free what it needs; no pass follows."""


class Model(ABC):
    """A loaded model with one sequence of tokens in its KV cache.

    `forward` appends tokens at the end of the sequence and `truncate` drops them again. Truncating and
    appending again must give the same logits as never having appended.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    context: int
    """The most tokens that the KV cache holds."""
    batch_size: int
    """The most tokens of one forward pass."""
    max_verify_batch: int = 1
    """The most tokens that `forward_rows` takes: it returns the logits of each."""
    supports_snapshot: bool = False
    """Whether the KV cache can be saved to a file and loaded: `snapshot_properties`, `save_kv`, `load_kv`."""
    supports_copy: bool = False
    """Whether the KV cache can be copied to memory and back: `snapshot_bytes`, `copy_kv`, `put_kv`."""
    verifies_trees: bool = False
    """Whether `forward_tree` computes branches beside the trunk."""
    supports_batch: bool = False
    """Whether `open_sequences` works: several sequences in one forward pass."""
    buffers: tuple[Buffer, ...] = ()
    """Its buffers on devices and in main memory, as the engine reports them."""
    batch_truncates: bool = True
    """Whether sequences of a batch can drop their last tokens, as rejected drafts are."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""

    @abstractmethod
    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append up to `batch_size` tokens and return the logits of the last one, shape (vocabulary,).

        The array is a view that the next call overwrites. Raises `ForwardError` where native code fails;
        the KV cache is then as it was before.
        """

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append up to `max_verify_batch` tokens; return the logits of each, shape (tokens, vocabulary)."""
        if len(token_ids) != 1:
            raise ForwardError(
                f"{self.spec.name} computes the logits of one token at a time, not of {len(token_ids)}"
            )
        return self.forward(token_ids)[None]

    def forward_tree(self, tree: TokenTree) -> Logits2D:
        """Append the trunk of a draft tree, whose rows come first; return logits, (rows, vocabulary).

        The logits are those of the tree's first rows: of all rows, or of the trunk alone where branches
        could not be computed. A tree has at most `max_verify_batch` tokens.
        """
        return self.forward_rows(tree.token_ids[: tree.trunk_rows])

    def commit_branch(self, row: int) -> None:
        """Put a row of the last `forward_tree` in the trunk's place at its depth.

        To accept a path, call this for each of its rows in order, before any other pass.
        """
        return None

    @abstractmethod
    def truncate(self, num_tokens: int) -> int:
        """Drop every token from position `num_tokens` on and return how many remain.

        A model that cannot go back (a recurrent one) drops everything and returns 0.
        """

    def release_pages(self) -> None:
        """Return pages of the KV cache that hold no token to the system, where the model can."""
        return None

    def logits_beyond(self, num_rows: int) -> tuple[int, int] | None:
        """Return the address and the bytes of logits that passes of more than `num_rows` tokens have written.

        Until the next such pass nothing reads them. 0 bytes where there was none, and None where they are not in memory
        that could be released.
        """
        return None

    def snapshot_properties(self) -> dict[str, str]:
        """Return the properties that a saved KV cache depends on; a snapshot loads only where all are equal."""
        raise SnapshotError(f"{self.spec.name} cannot save its KV cache")

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache, which holds exactly `token_ids`, to a file and return its size in bytes.

        Raises `SnapshotError` with the reason, such as a full disk.
        """
        raise SnapshotError(f"{self.spec.name} cannot save its KV cache")

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Load `num_tokens` tokens from the first `num_bytes` of a file, and return them.

        The bytes must come from `save_kv` with the same `snapshot_properties`; continuing then equals never
        having stopped. Raises `SnapshotError` where they do not; the KV cache is then empty.
        """
        raise SnapshotError(f"{self.spec.name} cannot load a KV cache")

    def snapshot_bytes(self) -> int:
        """Return the size of a copy of the KV cache as it is now."""
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def copy_kv(self, into: memoryview) -> None:
        """Copy the KV cache into a writable buffer of `snapshot_bytes` bytes, without another copy.

        Raises `SnapshotError` where the buffer has another size; its content is then undefined.
        """
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def put_kv(self, snapshot: memoryview, num_tokens: int) -> None:
        """Restore what `copy_kv` copied while the KV cache held `num_tokens` tokens.

        Continuing then equals never having left. Raises `SnapshotError` where it is not such a copy; the KV
        cache is then empty.
        """
        raise SnapshotError(f"{self.spec.name} cannot copy its KV cache")

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> SequenceBatch:
        """Return a KV cache of `num_slots` slots for several sequences; the model's own stays as it is.

        A pass returns the logits of up to `max_logits` tokens; None: one per sequence. Raises `ModelError` where it
        cannot be made.
        """
        raise UnsupportedModel(
            f"{self.spec.name} computes one sequence at a time: send one prompt after another"
        )

    @abstractmethod
    def close(self) -> None:
        """Free everything; any other call is then an error. Closing twice is allowed."""

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """Tokens to append to a sequence; the pass returns the logits of the last `num_logits`."""

    sequence: int
    token_ids: Sequence[int]
    num_logits: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlots:
    """The KV slots of a forward pass over several slices, in the order of their tokens.

    Every slice attends to the first `num_shared` slots. Slice i has `num_rows[i]` tokens, one after the other,
    and attends to the slots `own[i]` too.
    """

    num_shared: int
    num_rows: tuple[int, ...]
    own: tuple[array[int], ...]


class SequenceBatch(ABC):
    """`num_sequences` sequences in one KV cache of `num_slots` slots; close it before its model.

    A pass takes up to `batch_size` tokens and returns the logits of up to `max_logits`. Sequences that begin with the
    same tokens may hold their slots together (`copy_prefix`).
    """

    num_sequences: int
    num_slots: int
    batch_size: int
    max_logits: int

    @property
    @abstractmethod
    def num_free(self) -> int:
        """How many slots no sequence holds."""

    @abstractmethod
    def num_held(self, sequences: Iterable[int], sequence: int, num_tokens: int) -> int:
        """Return how many slots these sequences hold together with the first tokens of another one."""

    def neighbours(self, sequence: int) -> Sequence[int]:
        """Return a sort key under which sequences are neighbours that hold most slots together.

        Slices in this order are computed faster where the kernels read shared keys once.
        """
        return ()

    @abstractmethod
    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target`, which is empty, begin with the first `num_tokens` of `source`, in the same slots."""

    @abstractmethod
    def forward(self, slices: Sequence[SequenceSlice]) -> Logits2D:
        """Append each slice to its sequence in one pass; a sequence has at most one slice.

        Returns the requested logits in order, shape (tokens, vocabulary): a view that the next call
        overwrites. Raises `ForwardError` where native code fails; the sequences are unusable then until `clear`.
        """

    def failure(self, logits: Logits2D, token_ids: Sequence[int]) -> ForwardError | None:
        """Return the error of a sequence whose logits of the last pass, over `token_ids`, are not numbers."""
        return None

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drop a sequence's tokens from `num_tokens` on; slots that no other sequence holds are reused.

        Truncating and appending again must give the same logits as never having appended.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop all tokens of all sequences."""

    def rows_agree(self) -> bool:
        """Try whether a token's logits beside other sequences are bit for bit those that it has alone.

        Called while the sequences are empty; they are empty afterwards.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Free everything. Closing twice is allowed."""


class SingleSequence:
    """The first sequence of an empty batch, used like a model's only one: to time passes."""

    def __init__(self, sequences: SequenceBatch) -> None:
        self._sequences = sequences

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last one, shape (vocabulary,)."""
        logits: Logits = self._sequences.forward([SequenceSlice(0, token_ids)])[0]
        return logits

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens and return the logits of each, shape (tokens, vocabulary)."""
        return self._sequences.forward([SequenceSlice(0, token_ids, num_logits=len(token_ids))])

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from position `num_tokens` on."""
        self._sequences.truncate(0, num_tokens)
