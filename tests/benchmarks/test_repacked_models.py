"""Repacked weights at a long context, in Gemma-3-270m, and in a model with the shape of Llama-3.2-1B.

Each round times llama.cpp with its C API and then lowtide; a ratio above 1 means lowtide is faster. For the
large shape, the bandwidth of reading weights is compared with the memory bandwidth of two threads. Run with
`make bench`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model
from peer import Peer
from repacked_beside import NUM_DECODED, ROWS, RepackedModel, compare_decode, compare_prefill

from lowtide.memory.units import GIB, MIB
from lowtide.models.catalog import resolve

pytestmark = pytest.mark.benchmark

DEPTH = 7600
LARGE = {
    "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "feed_forward": 8192,
    "vocabulary": 128_256, "context": 2048,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def deep(smollm2: Path) -> Iterator[tuple[RepackedModel, Peer]]:
    repacked = RepackedModel(smollm2, 8192)
    peer = Peer(smollm2, context=8192, batch_size=ROWS, threads=2)
    with closing(repacked.loaded), closing(peer):
        repacked.prefill(DEPTH)
        peer.prefill(repacked.token_ids[:DEPTH])
        yield repacked, peer


@pytest.mark.parametrize("attention", ["dense", "tidal"])
def test_decode_at_7600(
    benchmark: Any, deep: tuple[RepackedModel, Peer], smollm2: Path, attention: str
) -> None:
    repacked, peer = deep
    compare_decode(
        benchmark, "llama.cpp", repacked, peer, DEPTH, attention=attention, is_filled=True
    )


def test_prefill_of_7600(benchmark: Any, deep: tuple[RepackedModel, Peer]) -> None:
    compare_prefill(benchmark, "llama.cpp", *deep, DEPTH, rounds=2)


@pytest.fixture(scope="module")
def gemma() -> Iterator[tuple[RepackedModel, Peer]]:
    path = Path(resolve("gemma3-270m"))
    repacked, peer = RepackedModel(path), Peer(path, context=2048, batch_size=ROWS, threads=2)
    with closing(repacked.loaded), closing(peer):
        yield repacked, peer


def test_decode_of_gemma(benchmark: Any, gemma: tuple[RepackedModel, Peer]) -> None:
    compare_decode(benchmark, "llama.cpp, Gemma-3-270m", *gemma, 256)


def test_prefill_of_gemma(benchmark: Any, gemma: tuple[RepackedModel, Peer]) -> None:
    compare_prefill(benchmark, "llama.cpp, Gemma-3-270m", *gemma, 256)


@pytest.fixture(scope="module", params=["Q4_0", "Q4_K"])
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, RepackedModel, Peer]]:
    """Yield the format, the bytes of weights that a token reads, and both engines."""
    path = tmp_path_factory.mktemp("large") / f"{request.param}.gguf"
    write_model(path, **LARGE, quantised=request.param)
    repacked, peer = RepackedModel(path), Peer(path, context=2048, batch_size=ROWS, threads=2)
    embedding = (
        LARGE["vocabulary"] * LARGE["width"] * 18 // 32
    )  # 4.5 bits per weight in both formats
    with closing(repacked.loaded), closing(peer):
        yield request.param, path.stat().st_size - embedding, repacked, peer


def read_rate() -> float:
    """Return the bytes/s at which two threads read uncached memory, the best of five rounds."""
    halves = np.split(np.ones(GIB // 8, np.int64), 2)
    seconds = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, halves))
            seconds.append(time.perf_counter() - started)
    return GIB / min(seconds)


def test_decode_of_the_shape_of_llama_1b(
    benchmark: Any, large: tuple[str, int, RepackedModel, Peer]
) -> None:
    kind, num_bytes, repacked, peer = large
    compare_decode(benchmark, f"llama.cpp, 1B in {kind}", repacked, peer, 256, rounds=5)
    rate, most = num_bytes * NUM_DECODED / benchmark.stats.stats.median, read_rate()
    benchmark.extra_info.update(bytes_per_s=rate, most_bytes_per_s=most)
    print(
        f"{num_bytes // MIB:,} MiB of weights per token at {rate / 1e9:.1f} GB/s; two threads read "
        f"{most / 1e9:.1f} GB/s: {rate / most:.0%}"
    )


def test_prefill_of_the_shape_of_llama_1b(
    benchmark: Any, large: tuple[str, int, RepackedModel, Peer]
) -> None:
    kind, _, repacked, peer = large
    compare_prefill(benchmark, f"llama.cpp, 1B in {kind}", repacked, peer, 256, rounds=3)
