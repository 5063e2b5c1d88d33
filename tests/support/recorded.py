"""Collect the logits of a runtime's forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lowtide import Runtime


@contextmanager
def recorded_logits(runtime: Runtime) -> Iterator[list[bytes]]:
    """Collect the logits of every forward pass, as bytes."""
    seen: list[bytes] = []
    forward = runtime._model.forward

    def recording(token_ids):  # type: ignore[no-untyped-def]
        logits = forward(token_ids)
        seen.append(logits.tobytes())
        return logits

    runtime._model.forward = recording  # type: ignore[method-assign]
    yield seen
    runtime._model.forward = forward  # type: ignore[method-assign]
