"""Model: the one seam between a runtime and whatever computes.

Knows no budget, no policy and no sampling. `GgufModel` and `FakeModel` implement it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from lowtide.models.spec import ModelSpec
from lowtide.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits: TypeAlias = NDArray[np.float32]


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

    @abstractmethod
    def truncate(self, num_tokens: int) -> int:
        """Forget every token from position `num_tokens` on and return how many are kept.

        A model that cannot go back (a recurrent one) forgets everything and returns 0.
        """

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
