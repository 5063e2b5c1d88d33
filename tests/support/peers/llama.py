"""llama.cpp through its C API, with its default batch."""

from __future__ import annotations

import time
from pathlib import Path

from peer import Peer

from .worker import THREADS

BATCH = 512


class Llama:
    """The loop of tests/support/peer.py."""

    def __init__(self, path: Path, context: int) -> None:
        self.peer = Peer(path, context=context, batch_size=BATCH, threads=THREADS)

    def answer(self, token_ids: list[int], tokens: int) -> list[float]:
        """Read the prompt and decode."""
        self.peer.prefill(token_ids)
        times = [time.perf_counter()]
        while len(times) < tokens:
            self.peer.decode(1)
            times.append(time.perf_counter())
        return times


def open_engine(path: Path, context: int) -> Llama:
    """Open a GGUF file."""
    return Llama(path, context)
