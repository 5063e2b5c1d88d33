"""TokenCache: keys and values that follow the tokens in use, whoever attends to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator


class TokenCache(ABC):
    """Keys and values of every layer, for one sequence of tokens."""

    @abstractmethod
    def cut(self, num_tokens: int, kept: int) -> None:
        """Forget the tokens from `kept` on, of `num_tokens`, and give their pages back."""

    @abstractmethod
    def rows(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield the bytes of the tokens in every tensor, part by part; they can be written.

        A part is released as the next one is asked for: whoever keeps one would keep a buffer from closing.
        """

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.rows(num_tokens))

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
