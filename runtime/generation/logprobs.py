"""Log probabilities of sampled tokens, as the model gives them.

They are those of the logits alone: before biases, penalties, a constraint and the temperature change anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lowtide.models.model import Logits


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the bytes of its text, and its natural log probability; `top` are the most probable at its place."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The token's text; bytes of incomplete characters are replaced."""
        return self.token.decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON, as OpenAI's API names them."""
        values: dict[str, Any] = {
            "token": self.text,
            "logprob": self.logprob,
            "bytes": list(self.token),
        }
        return {**values, "token_id": self.token_id}


class LogprobMeter:
    """Finds the log probabilities of sampled tokens, and of the `num_top` most probable ones beside each.

    `bytes_of` returns the bytes of a token's text.
    """

    def __init__(self, num_top: int, bytes_of: Callable[[int], bytes]) -> None:
        self._num_top = num_top
        self._bytes_of = bytes_of

    def measure(self, logits: Logits, token_id: int) -> TokenLogprob:
        """Return the token's log probability under `logits`, of shape (vocabulary,).

        Holds at most three fp32 arrays of the vocabulary's size at once.
        """
        largest = logits.max()
        shifted = logits - largest
        np.exp(shifted, out=shifted)
        total = float(largest) + float(np.log(shifted.sum(dtype=np.float64)))
        del shifted
        top = tuple(self._scored(one, logits, total) for one in self._largest(logits))
        return TokenLogprob(
            token_id, self._bytes_of(token_id), float(logits[token_id]) - total, top
        )

    def _scored(self, token_id: int, logits: Logits, total: float) -> TokenLogprob:
        return TokenLogprob(token_id, self._bytes_of(token_id), float(logits[token_id]) - total)

    def _largest(self, logits: Logits) -> list[int]:
        count = min(self._num_top, len(logits))
        if count == 0:
            return []
        found = np.argpartition(logits, len(logits) - count)[-count:]
        ordered: list[int] = found[np.argsort(-logits[found], kind="stable")].tolist()
        return ordered
