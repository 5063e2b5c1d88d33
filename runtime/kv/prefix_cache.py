"""PrefixCache: the KV states of prompts that others replaced, found again by their beginnings.

Holds no more bytes than it may: the state that was used least recently goes first. Knows no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lowtide.memory.os.pages import round_up
from lowtide.memory.units import KIB
from lowtide.models.errors import SnapshotError
from lowtide.models.model import Model
from lowtide.models.page_buffer import PageBuffer
from lowtide.models.tokenizer import common_prefix

OBJECT_BYTES = 2 * KIB
"""What Python's objects around a state take at most."""
LEAST_SHARE = 1 / 8
"""Of a state's tokens: where fewer would be lost it is not worth its bytes, which others may need more."""
_ID_BYTES = array("i").itemsize


class CachedPrefix:
    """A copy of a model's KV cache and the tokens in it, in pages of its own.

    Tokens from `exact_until` on have keys and values that an approximate pass computed.
    """

    def __init__(self, token_ids: Sequence[int], num_state_bytes: int, exact_until: int) -> None:
        num_id_bytes = len(token_ids) * _ID_BYTES
        self._pages = PageBuffer(num_id_bytes + num_state_bytes)
        self.token_ids = self._pages.view[:num_id_bytes].cast("i")
        self.token_ids[:] = array("i", token_ids)
        self.state = self._pages.view[num_id_bytes:]
        self.num_tokens = len(token_ids)
        self.exact_until = exact_until
        self.num_bytes = kept_bytes(len(token_ids), num_state_bytes)

    def close(self) -> None:
        """Give the memory back."""
        self.token_ids.release()
        self.state.release()
        self._pages.close()


class PrefixCache:
    """At most `limit_bytes` of states; with 0 nothing is kept and nothing is found."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._states: list[CachedPrefix] = []  # the least recently used first

    @property
    def num_bytes(self) -> int:
        """What is kept now."""
        return sum(state.num_bytes for state in self._states)

    def find(self, token_ids: Sequence[int], longer_than: int) -> CachedPrefix | None:
        """Return the state with the longest common beginning, beyond `longer_than` tokens; None for none.

        Of several the shortest: the least is put back.
        """
        ranked = [
            (common_prefix(state.token_ids, token_ids), -state.num_tokens, state)
            for state in self._states
        ]
        common, _, found = max(ranked, key=lambda one: one[:2], default=(0, 0, None))
        if found is None or common <= longer_than:
            return None
        self._use(found)
        return found

    def keep(
        self,
        model: Model,
        token_ids: Sequence[int],
        exact_until: int,
        *,
        num_staying: int = 0,
        besides: CachedPrefix | None = None,
    ) -> None:
        """Copy the model's state, that of `token_ids`, where it fits and is worth it.

        The first `num_staying` tokens stay in the model in any case. A state that these tokens continue is
        replaced; `besides` is not given up for the new one.
        """
        num_tokens = len(token_ids)
        if not num_tokens or not self.limit_bytes:
            return
        common = {state: common_prefix(state.token_ids, token_ids) for state in self._states}
        covering = next((state for state in common if common[state] == num_tokens), None)
        if covering is not None:
            self._use(covering)
            return
        continued = [state for state in common if common[state] == state.num_tokens]
        num_lost = num_tokens - max([num_staying, *common.values()])
        if not continued and num_lost < LEAST_SHARE * num_tokens:
            return
        needed_bytes = kept_bytes(num_tokens, model.snapshot_bytes())
        if needed_bytes + (besides.num_bytes if besides else 0) > self.limit_bytes:
            return
        for state in continued:
            self.discard(state)
        self._make_room(needed_bytes, besides)
        self._copy(model, token_ids, exact_until)

    def _make_room(self, num_bytes: int, besides: CachedPrefix | None) -> None:
        for state in [state for state in self._states if state is not besides]:
            if self.num_bytes + num_bytes <= self.limit_bytes:
                return
            self.discard(state)

    def _copy(self, model: Model, token_ids: Sequence[int], exact_until: int) -> None:
        """Without memory for it, or where native code fails, there is one state less and no harm done."""
        try:
            kept = CachedPrefix(token_ids, model.snapshot_bytes(), exact_until)
        except MemoryError:
            return
        try:
            model.copy_kv(kept.state)
        except BaseException as error:
            kept.close()
            if isinstance(error, SnapshotError):
                return
            raise
        self._states.append(kept)

    def _use(self, state: CachedPrefix) -> None:
        self._states.remove(state)
        self._states.append(state)

    def discard(self, state: CachedPrefix) -> None:
        """Give one state up."""
        self._states.remove(state)
        state.close()

    def clear(self) -> None:
        """Give everything up; prompts are read again."""
        for state in self._states[:]:
            self.discard(state)


def kept_bytes(num_tokens: int, num_state_bytes: int) -> int:
    """Return what a state takes in the cache, with its tokens, in whole pages."""
    return round_up(num_tokens * _ID_BYTES + num_state_bytes) + OBJECT_BYTES
