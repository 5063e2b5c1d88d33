"""CachedModel: an ONNX model with its KV cache in buffers of ours. Knows no session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowtide.models.errors import ForwardError, StateError
from lowtide.models.model import Model
from lowtide.models.onnx.cache_file import read_cells, write_cells
from lowtide.models.onnx.token_cache import TokenCache


class CachedModel(Model):
    """What is the same however the graph is run: going back, and the cache in a file or a copy."""

    keeps_state = copies_state = True
    _num_tokens: int = 0
    _cache: TokenCache | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return self._num_tokens

    def _checked_rows(self, token_ids: Sequence[int]) -> int:
        num_rows, room = len(token_ids), self.context - self._num_tokens
        if not 0 < num_rows <= min(self.max_rows, room):
            raise ForwardError(
                f"{num_rows} rows do not go in: 1 to {self.max_rows} a pass, room for {room} tokens"
            )
        num_logits = self.spec.vocabulary.num_tokens
        outside = next((i for i in token_ids if not 0 <= i < num_logits), None)
        if outside is not None:
            raise ForwardError(f"token {outside} is not in the vocabulary of {num_logits}")
        return num_rows

    @property
    def _kv(self) -> TokenCache:
        assert self._cache is not None, "the model is closed"
        return self._cache

    def truncate(self, num_tokens: int) -> int:
        """Forget the tokens from `num_tokens` on; their pages go back to the system."""
        kept = max(min(num_tokens, self._num_tokens), 0)
        if kept < self._num_tokens:
            self._kv.cut(self._num_tokens, kept)
        self._num_tokens = kept
        return kept

    def trim(self) -> None:
        """Give back the pages that hold no token."""
        self._kv.cut(self._num_tokens, self._num_tokens)

    def save_state(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the tokens and the cells that hold them, from where they lie."""
        assert len(token_ids) == self._num_tokens, "these are not the tokens in the cache"
        return write_cells(path, token_ids, self._kv)

    def load_state(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Put a file's tokens and cells back; cells that hold no token stay untouched."""
        self.truncate(0)
        if not 0 <= num_tokens <= self.context:
            raise StateError(f"it holds {num_tokens:,} tokens, there is room for {self.context:,}")
        self._num_tokens = num_tokens  # what is read is given back where reading fails
        try:
            return read_cells(
                path,
                num_bytes,
                self._kv,
                num_tokens=num_tokens,
                vocabulary=self.spec.vocabulary.num_tokens,
            )
        except BaseException:
            self.truncate(0)
            raise

    def state_bytes(self) -> int:
        """Return the bytes of the cells that hold tokens."""
        return self._kv.num_bytes(self._num_tokens)

    def copy_state(self, into: memoryview) -> None:
        """Copy the cells that hold tokens, head by head."""
        if len(into) != self.state_bytes():
            raise StateError(f"{len(into)} bytes are given, {self.state_bytes()} are wanted")
        position = 0
        for row in self._kv.rows(self._num_tokens):
            into[position : position + row.nbytes] = row
            position += row.nbytes

    def put_state(self, state: memoryview, num_tokens: int) -> None:
        """Put the cells back; those that hold no token stay untouched."""
        self.truncate(0)
        is_held = 0 <= num_tokens <= self.context
        if not is_held or self._kv.num_bytes(num_tokens) != len(state):
            raise StateError(f"the state has {len(state)} bytes, which is not {num_tokens} tokens'")
        position = 0
        for row in self._kv.rows(num_tokens):
            row[:] = state[position : position + row.nbytes]
            position += row.nbytes
        self._num_tokens = num_tokens

    def close(self) -> None:
        """Free the cache."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None
