"""TextRule: which bytes may follow which, as an automaton. Knows texts and no tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.runtime.structured.rules.token_order import TokenOrder

    Mask = NDArray[np.bool_]

State = Hashable


class TextRule(ABC):
    """An automaton over bytes. Its states are values that are never changed, and `start` is the first."""

    start: Any
    is_free = True
    """Whether tokens without text (control tokens) may come; they change nothing."""

    @abstractmethod
    def step(self, state: Any, text: bytes) -> Any:
        """Return the state behind `text`; None where it may not come."""

    @abstractmethod
    def legal(self, state: Any, tokens: TokenOrder) -> Mask:
        """Return which tokens may come, bool of shape (vocabulary,)."""

    def is_accepting(self, state: Any) -> bool:
        """Whether the answer may end here."""
        return True

    def is_done(self, state: Any) -> bool:
        """Whether nothing may follow."""
        return False

    def ending(self, state: Any) -> bytes | None:
        """Return a short text that brings the answer to an end; None where none is known."""
        return b""

    def hints(self, state: Any) -> Iterable[bytes]:
        """Yield texts that lead towards the end, for where other rules do not allow `ending`."""
        found = self.ending(state)
        return (found,) if found else ()

    def forced(self, state: Any) -> bytes:
        """Return the text that must come next; b"" where several may."""
        return b""

    @property
    def num_bytes(self) -> int:
        """Bytes that the rule holds, beside a few of each answer."""
        return 0
