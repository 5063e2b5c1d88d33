"""Model: the one seam between a runtime and whatever computes.

Knows no budget, no policy and no sampling. `GgufModel` and `FakeModel` implement it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from lowtide.models.errors import ForwardError, StateError, UnsupportedModel
from lowtide.models.sequences import Sequences
from lowtide.models.spec import ModelSpec
from lowtide.models.token_tree import TokenTree
from lowtide.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits: TypeAlias = NDArray[np.float32]
    RowLogits: TypeAlias = NDArray[np.float32]


class Model(ABC):
    """A loaded model with one sequence of tokens in its KV cache.

    Rows go in at the end of the sequence; `truncate` takes them off again. Truncating and appending
    again must equal never having appended.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    context: int
    """How many tokens the KV cache holds."""
    max_rows: int
    """How many rows one forward pass takes."""
    max_verified_rows: int = 1
    """How many rows `forward_rows` takes: it returns the logits of each."""
    keeps_state: bool = False
    """Whether the KV cache can be written to a file and read again: the three methods on state."""
    copies_state: bool = False
    """Whether it can be copied into memory and put back: `state_bytes`, `copy_state`, `put_state`."""

    verifies_trees: bool = False
    """Whether `forward_tree` takes branches beside the trunk."""
    keeps_sequences: bool = False
    """Whether several sequences can go through it together: `open_sequences`."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""

    @abstractmethod
    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last row, shape (vocabulary,).

        The array is a view that the next call overwrites. At most `max_rows` tokens go in at once.
        Raises `ForwardError` where native code fails; the cache is then as it was before.
        """

    def forward_rows(self, token_ids: Sequence[int]) -> RowLogits:
        """Append the tokens as `forward` does; return the logits of every row, shape (rows, vocabulary).

        At most `max_verified_rows` tokens go in at once.
        """
        if len(token_ids) != 1:
            raise ForwardError(
                f"{self.spec.name} computes the logits of one row, not {len(token_ids)}"
            )
        return self.forward(token_ids)[None]

    def forward_tree(self, tree: TokenTree) -> RowLogits:
        """Append a tree's trunk, which comes first in it; return the logits of rows, (rows, vocabulary).

        Those are the first rows of the tree: all of them, or the trunk's, where branches could not be
        computed. At most `max_verified_rows` tokens go in at once.
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

    def state_owner(self) -> dict[str, str]:
        """Return whose keys and values a state holds, by property: another model's must differ in one."""
        raise StateError(f"{self.spec.name} cannot keep its KV cache in a file")

    def save_state(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the KV cache of `token_ids`, all that it holds, to a file and return its bytes.

        Raises `StateError` with the reason, such as a full disk.
        """
        raise StateError(f"{self.spec.name} cannot keep its KV cache in a file")

    def load_state(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put back what lies in the first `num_bytes` of a file, and return its tokens, `num_tokens`.

        Going on from there equals never having left. The bytes must be those that `save_state` of this
        `state_owner` wrote. Raises `StateError` where they are not; the cache is then empty.
        """
        raise StateError(f"{self.spec.name} cannot keep its KV cache in a file")

    def state_bytes(self) -> int:
        """Return how many bytes a copy of the KV cache takes as it is now."""
        raise StateError(f"{self.spec.name} cannot copy its KV cache")

    def copy_state(self, into: memoryview) -> None:
        """Copy the KV cache into `state_bytes` bytes that can be written; no other copy is made.

        Raises `StateError` where they are not enough; what they hold is no state then.
        """
        raise StateError(f"{self.spec.name} cannot copy its KV cache")

    def put_state(self, state: memoryview, num_tokens: int) -> None:
        """Be where this model was when `copy_state` took the state of `num_tokens`.

        Going on from there equals never having left. Raises `StateError` where it is no such state; the
        cache is then empty.
        """
        raise StateError(f"{self.spec.name} cannot copy its KV cache")

    def open_sequences(
        self, num_sequences: int, num_cells: int, max_wanted: int | None = None
    ) -> Sequences:
        """Return a cache of `num_cells` tokens for several sequences; this model's own stays as it is.

        Logits of `max_wanted` rows of a pass come out, of one a sequence in any case. Raises `ModelError`
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
