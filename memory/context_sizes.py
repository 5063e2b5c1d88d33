"""ContextSizes: what llama.cpp allocates for a context. By formulas here; `runtime` has it simulated."""

from __future__ import annotations

from typing import Protocol

from lowtide.memory import footprint
from lowtide.models.spec import ModelSpec


class ContextSizes(Protocol):
    """Bytes by context in tokens, rows a pass and KV type."""

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes."""
        ...

    def compute_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return the compute buffer's bytes."""
        ...

    def reader_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return what a second context on the same weights takes beside its cache."""
        ...


class FormulaSizes:
    """The formulas of `footprint`: exact for the cache, an upper bound for the compute buffer."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def kv_bytes(self, context: int, kv_type: str) -> int:
        """Return the whole cache's bytes, exactly."""
        return footprint.kv_bytes(self._spec, context, kv_type)

    def compute_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return at least the compute buffer's bytes."""
        return footprint.compute_bytes(self._spec, context, max_rows, kv_type)

    def reader_bytes(self, context: int, max_rows: int, kv_type: str) -> int:
        """Return a compute buffer of its own, and a row of logits."""
        computing = self.compute_bytes(context, max_rows, kv_type)
        return footprint.second_context_bytes(self._spec, computing)
