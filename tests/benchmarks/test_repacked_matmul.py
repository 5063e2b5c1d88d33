"""Repacked weights compared with llama.cpp on the same file, on a Q4_0 copy, and on F16 and BF16 copies.

Also the KL divergence of both from the same weights in fp32. Each round times llama.cpp with its C API and
then lowtide, so that ratios are valid on a noisy machine; above 1 means lowtide is faster. Run with
`make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from essays import essays
from peer import Peer
from repacked_beside import (
    ROWS,
    RepackedModel,
    compare_decode,
    compare_prefill,
    compare_verification,
)
from requantised import requantised

from lowtide.attention.evaluation.divergence import log_softmax
from lowtide.memory.units import GIB
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark

KINDS = ("original", "repacked")


@pytest.fixture(scope="module")
def q4_0(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return requantised(smollm2, tmp_path_factory.mktemp("models") / "Q4_0.gguf", "Q4_0")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def repacked(smollm2: Path) -> Iterator[RepackedModel]:
    made = RepackedModel(smollm2)
    yield made
    made.loaded.close()


@pytest.fixture(scope="module", params=["the same file", "its Q4_0 copy"])
def peer(request: pytest.FixtureRequest, smollm2: Path, q4_0: Path) -> Iterator[tuple[str, Peer]]:
    path = smollm2 if request.param == "the same file" else q4_0
    made = Peer(path, context=2048, batch_size=ROWS, threads=2)
    yield f"llama.cpp on {request.param}", made
    made.close()


@pytest.fixture(scope="module", params=["F16", "BF16"])
def floats(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, RepackedModel, Peer]]:
    """Yield the type of a copy that is not quantised, the repacked model, and llama.cpp."""
    kind = request.param
    path = requantised(smollm2, tmp_path_factory.mktemp("floats") / f"{kind}.gguf", kind)
    repacked = RepackedModel(path)
    with (
        closing(repacked.loaded),
        closing(Peer(path, context=2048, batch_size=ROWS, threads=2)) as peer,
    ):
        yield kind, repacked, peer


@pytest.mark.parametrize("depth", [256, 1024])
def test_decode(
    benchmark: Any, repacked: RepackedModel, peer: tuple[str, Peer], depth: int
) -> None:
    compare_decode(benchmark, peer[0], repacked, peer[1], depth)


@pytest.mark.parametrize("length", [256, 512])
def test_prefill(
    benchmark: Any, repacked: RepackedModel, peer: tuple[str, Peer], length: int
) -> None:
    compare_prefill(benchmark, peer[0], repacked, peer[1], length)


@pytest.mark.parametrize("num_rows", [2, 4, 8])
def test_verification(benchmark: Any, repacked: RepackedModel, num_rows: int) -> None:
    compare_verification(benchmark, repacked, num_rows)


def test_decode_of_floats(benchmark: Any, floats: tuple[str, RepackedModel, Peer]) -> None:
    kind, repacked, peer = floats
    compare_decode(benchmark, f"llama.cpp on {kind}", repacked, peer, 256)


def test_prefill_of_floats(benchmark: Any, floats: tuple[str, RepackedModel, Peer]) -> None:
    kind, repacked, peer = floats
    compare_prefill(benchmark, f"llama.cpp on {kind}", repacked, peer, 512)


@pytest.mark.parametrize("num_rows", [4, 8])
def test_verification_of_floats(
    benchmark: Any, floats: tuple[str, RepackedModel, Peer], num_rows: int
) -> None:
    compare_verification(benchmark, floats[1], num_rows)


NUM_READ, NUM_COMPARED = 384, 300


def distributions(path: Path, token_ids: list[int], *, repack: bool) -> np.ndarray:
    """Return log probabilities after each compared token, with lowtide's attention."""
    options = LoadConfig(memory=8 * GIB, context=1024, threads=2, attention="dense", repack=repack)
    loaded = Engine(plan_reference(path, options))
    try:
        for at in range(0, NUM_READ, ROWS):
            loaded.model.forward(token_ids[at : at + ROWS])
        compared = token_ids[NUM_READ : NUM_READ + NUM_COMPARED]
        return np.stack([log_softmax(loaded.model.forward((t,))) for t in compared])
    finally:
        loaded.close()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_divergence_from_the_same_weights_in_fp32(
    benchmark: Any, smollm2: Path, repacked: RepackedModel, tmp_path: Path, share: float
) -> None:
    text = essays()
    encode = repacked.model.tokenizer.encode
    token_ids = encode(text[int(len(text) * share) :][:8000], add_special=True, parse_special=False)
    exact = distributions(
        requantised(smollm2, tmp_path / "F32.gguf", "F32"), token_ids, repack=False
    )
    found: dict[str, np.ndarray] = {}

    def decode() -> None:
        found.update({n: distributions(smollm2, token_ids, repack=n == "repacked") for n in KINDS})

    benchmark.pedantic(decode, rounds=1)
    kl = {n: float((np.exp(exact) * (exact - rows)).sum(1).mean()) for n, rows in found.items()}
    benchmark.extra_info.update(kl)
    print(f"\nessays from {share:.0%} on, KL from fp32 weights, nats/token: {kl}")
