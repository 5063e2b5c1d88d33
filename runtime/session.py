"""Session: the tokens that are in a model's KV cache. Knows no text and no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.models.model import Model

if TYPE_CHECKING:
    from lowtide.models.model import Logits


class Session:
    """Keeps the KV cache and the list of its tokens in step, whatever interrupts them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.token_ids: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for another token."""
        return len(self.token_ids) >= self._model.context

    def rewind_to(self, token_ids: Sequence[int]) -> int:
        """Go back to the longest common beginning with `token_ids` and return its length.

        At least the last token is left to compute, since its logits are wanted. Also removes what an
        interrupted pass may have left behind.
        """
        common = _common_prefix(self.token_ids, token_ids)
        kept = self._model.truncate(max(min(common, len(token_ids) - 1), 0))
        del self.token_ids[kept:]
        return kept

    def append(self, token_ids: Sequence[int]) -> Logits:
        """Compute the tokens, at most `max_rows`, and return the last one's logits."""
        logits = self._model.forward(token_ids)
        self.token_ids.extend(token_ids)
        return logits


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
