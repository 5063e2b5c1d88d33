"""PrefixCache: KV snapshots of prompts that others replaced, found again by their common prefix.

Its size is limited: the snapshot that was used least recently is dropped first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lowtide.memory.os.pages import round_up
from lowtide.memory.units import KIB
from lowtide.models.errors import SnapshotError
from lowtide.models.model import Model
from lowtide.models.page_buffer import PageBuffer
from lowtide.models.text.tokenizer import common_prefix

OBJECT_BYTES = 2 * KIB
"""Most bytes of the Python objects around a snapshot."""
MIN_NEW_SHARE = 1 / 8
"""Least share of a snapshot's tokens that no other place holds: fewer are not worth the memory, which other
snapshots may need more."""
_ID_BYTES = array("i").itemsize


class CachedPrefix:
    """A copy of a model's KV cache with its tokens, in pages of its own.

    Tokens from position `exact_until` on have keys and values that an approximate pass computed. Prompts of `owner`
    alone may use it.
    """

    def __init__(
        self, token_ids: Sequence[int], kv_bytes: int, exact_until: int, owner: str = ""
    ) -> None:
        id_bytes = len(token_ids) * _ID_BYTES
        self._pages = PageBuffer(id_bytes + kv_bytes)
        self.token_ids = self._pages.view[:id_bytes].cast("i")
        self.token_ids[:] = array("i", token_ids)
        self.snapshot = self._pages.view[id_bytes:]
        self.num_tokens = len(token_ids)
        self.exact_until = exact_until
        self.owner = owner
        self.num_bytes = cached_bytes(len(token_ids), kv_bytes)

    def close(self) -> None:
        """Free the memory."""
        self.token_ids.release()
        self.snapshot.release()
        self._pages.close()


class PrefixCache:
    """Holds at most `limit_bytes` of snapshots; with 0 it stores nothing and finds nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._prefixes: list[CachedPrefix] = []  # the least recently used first

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return sum(prefix.num_bytes for prefix in self._prefixes)

    def find(
        self, token_ids: Sequence[int], longer_than: int, owner: str = ""
    ) -> CachedPrefix | None:
        """Return the snapshot of `owner` with the longest common prefix, of equals the shortest snapshot.

        None where no common prefix has more than `longer_than` tokens.
        """
        ranked = [
            (common_prefix(prefix.token_ids, token_ids), -prefix.num_tokens, prefix)
            for prefix in self._prefixes
            if prefix.owner == owner
        ]
        common, _, found = max(ranked, key=lambda one: one[:2], default=(0, 0, None))
        if found is None or common <= longer_than:
            return None
        self._use(found)
        return found

    def store(
        self,
        model: Model,
        token_ids: Sequence[int],
        exact_until: int,
        *,
        num_staying: int = 0,
        keep: CachedPrefix | None = None,
        owner: str = "",
    ) -> None:
        """Copy the model's KV cache, that of `token_ids`, if it fits and is worth it.

        The first `num_staying` tokens stay in the model in any case. A snapshot of which these tokens are a
        continuation is replaced; `keep` is not dropped to make room.
        """
        num_tokens = len(token_ids)
        if not num_tokens or not self.limit_bytes:
            return
        common = {
            prefix: common_prefix(prefix.token_ids, token_ids)
            for prefix in self._prefixes
            if prefix.owner == owner
        }
        covering = next((prefix for prefix in common if common[prefix] == num_tokens), None)
        if covering is not None:
            self._use(covering)
            return
        continued = [prefix for prefix in common if common[prefix] == prefix.num_tokens]
        num_new = num_tokens - max([num_staying, *common.values()])
        if not continued and num_new < MIN_NEW_SHARE * num_tokens:
            return
        needed_bytes = cached_bytes(num_tokens, model.snapshot_bytes())
        if needed_bytes + (keep.num_bytes if keep else 0) > self.limit_bytes:
            return
        for prefix in continued:
            self.discard(prefix)
        self._make_room(needed_bytes, keep)
        self._copy(model, token_ids, exact_until, owner)

    def _make_room(self, num_bytes: int, keep: CachedPrefix | None) -> None:
        for prefix in [prefix for prefix in self._prefixes if prefix is not keep]:
            if self.num_bytes + num_bytes <= self.limit_bytes:
                return
            self.discard(prefix)

    def _copy(self, model: Model, token_ids: Sequence[int], exact_until: int, owner: str) -> None:
        """Store a snapshot; without memory for it, or where native code fails, nothing is stored."""
        try:
            made = CachedPrefix(token_ids, model.snapshot_bytes(), exact_until, owner)
        except MemoryError:
            return
        try:
            model.copy_kv(made.snapshot)
        except BaseException as error:
            made.close()
            if isinstance(error, SnapshotError):
                return
            raise
        self._prefixes.append(made)

    def _use(self, prefix: CachedPrefix) -> None:
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def discard(self, prefix: CachedPrefix) -> None:
        """Drop one snapshot."""
        self._prefixes.remove(prefix)
        prefix.close()

    def clear(self) -> None:
        """Drop all snapshots; their prompts are computed again."""
        for prefix in self._prefixes[:]:
            self.discard(prefix)


def cached_bytes(num_tokens: int, kv_bytes: int) -> int:
    """Return the bytes of a snapshot in the cache, with its tokens, in whole pages."""
    return round_up(num_tokens * _ID_BYTES + kv_bytes) + OBJECT_BYTES
