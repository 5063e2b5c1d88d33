"""Default options against llama.cpp through its C API, on an idle machine: decode behind 256 tokens, prompts of 512.

Each round times llama.cpp and then lowtide, so that ratios are valid on a noisy machine; above 1 means lowtide is
faster. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from peer import Peer
from repacked_beside import ROWS, RepackedModel, compare_decode, compare_prefill

from lowtide.models.catalog import resolve
from lowtide.runtime.backends.config import AUTO

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[RepackedModel, Peer]]:
    path = resolve(request.param)
    own = RepackedModel(path, attention=AUTO, repack=AUTO)
    peer = Peer(path, context=2048, batch_size=ROWS, threads=2)
    print(f"\n{request.param}: {own.loaded.planned.kernels}")
    yield own, peer
    peer.close()
    own.loaded.close()


def test_decode(benchmark: Any, both: tuple[RepackedModel, Peer]) -> None:
    compare_decode(benchmark, "llama.cpp", *both, 256)


def test_prompt(benchmark: Any, both: tuple[RepackedModel, Peer]) -> None:
    compare_prefill(benchmark, "llama.cpp", *both, 512)
