"""The overhead of lowtide around the same kernels: prefill and decode beside llama.cpp's C API and its settings.

Each round times llama.cpp and then lowtide. The result is the median ratio of the rounds; above 1 means
lowtide is faster. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paired import paired
from peer import Peer

from lowtide import GenerationChunk, Runtime

pytestmark = pytest.mark.benchmark

TEXT = "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. "
NUM_DECODED = 64
SETTINGS = {"context": 2560, "batch_size": 128, "threads": 2}


@pytest.fixture(scope="module")
def runtime(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, memory="8GiB", reference=True, **SETTINGS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def peer(smollm2: Path) -> Iterator[Peer]:
    llama = Peer(smollm2, **SETTINGS)
    yield llama
    llama.close()


def prompt_of(runtime: Runtime, num_tokens: int) -> tuple[str, list[int]]:
    tokenizer = runtime._model.tokenizer
    token_ids = tokenizer.encode(TEXT * 200, add_special=True, parse_special=False)[:num_tokens]
    return tokenizer.decode(token_ids), token_ids


@pytest.mark.parametrize("depth", [256, 2048])
def test_decode(benchmark: Any, runtime: Runtime, peer: Peer, depth: int) -> None:
    text, token_ids = prompt_of(runtime, depth)
    peer.prefill(token_ids)
    expected = peer.decode(NUM_DECODED + 1)
    chunks: list[GenerationChunk] = []

    def begin() -> Iterator[GenerationChunk]:
        answer = runtime.stream(text, max_tokens=NUM_DECODED + 1, temperature=0)
        chunks.append(next(answer))
        return answer

    def run_peer() -> None:
        peer.api.llama_memory_seq_rm(peer.memory, 0, depth - 1, -1)
        peer._decode(token_ids[-1:])
        peer.decode(NUM_DECODED)

    # All but the last token of the prompt are in the cache: that token and the answer are timed.
    begin().close()
    answers: list[list[int | None]] = []

    def run_lowtide() -> None:
        answer = begin()
        answers.append([chunks[-1].token_id, *(chunk.token_id for chunk in answer)])

    paired(benchmark, f"decode at {depth}", run_lowtide, run_peer, rounds=25)
    assert answers[-1] == expected[: len(answers[-1])]


@pytest.mark.parametrize("length", [512, 2048])
def test_prefill(benchmark: Any, runtime: Runtime, peer: Peer, length: int) -> None:
    text, token_ids = prompt_of(runtime, length)

    def run_lowtide() -> None:
        runtime._session.truncate_to_prefix([-1])
        next(runtime.stream(text, max_tokens=1, temperature=0))

    paired(
        benchmark, f"prefill of {length}", run_lowtide, lambda: peer.prefill(token_ids), rounds=7
    )
