"""Long contexts: TidalDecode and lowtide's dense kernels compared with llama.cpp, in one context.

The default model at 7,600 tokens, and a random model with the shape of Llama-3.2-1B at 32,768, both with a
KV cache of random numbers. Each round times llama.cpp and then lowtide; a ratio above 1 means lowtide is
faster. "Attention alone" is the time without that of a token with an empty cache. Run with `make bench`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filled_cache import fill_cache
from gguf_files import write_model
from paired import paired

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.registry import parse_policy
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

pytestmark = pytest.mark.benchmark

NUM_DECODED = 16


class Deep:
    """A model with a hook and `depth` tokens of random numbers in its KV cache."""

    def __init__(self, path: Path, depth: int) -> None:
        self.depth = depth
        self.spec = read_spec(path)
        self.hook = LlamaHook(threads=2)
        options = LoadOptions(
            context=depth + 256, batch_size=32, threads=2, eval_callback=self.hook.callback
        )
        self.model = GgufModel(self.spec, options)
        self.floor = self._empty_token_s()
        fill_cache(self.model, depth)

    def _empty_token_s(self) -> float:
        """Return the seconds of a token with a nearly empty cache."""
        seconds = []
        for _ in range(5):
            self.model.truncate(0)
            started = time.perf_counter()
            for _ in range(NUM_DECODED):
                self.model.forward((5,))
            seconds.append((time.perf_counter() - started) / NUM_DECODED)
        return statistics.median(seconds)

    def decode(self, attention: str) -> None:
        policy = parse_policy(attention).resolve(self.spec)
        self.hook.set_active(policy.uses_native_kernels)
        controller = policy.configure(self.hook, self.spec)
        self.model.truncate(self.depth)
        for token_id in range(5, 5 + NUM_DECODED):
            controller.begin_decode()
            self.model.forward((token_id,))

    def close(self) -> None:
        self.model.close()
        self.hook.close()


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Iterator[Deep]:
    made = Deep(smollm2, 7600)
    yield made
    made.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deep]:
    path = write_model(
        tmp_path_factory.mktemp("large") / "llama-1b-shape.gguf",
        layers=16, width=2048, heads=32, kv_heads=8, feed_forward=8192, vocabulary=128_256,
        context=33_024, quantised="Q4_0",
    )  # fmt: skip
    made = Deep(path, 32_768)
    yield made
    made.close()


def measure(benchmark: Any, deep: Deep, name: str, attention: str, rounds: int) -> None:
    paired(benchmark, name, lambda: deep.decode(attention), lambda: deep.decode("llama"), rounds)
    lowtide_s = benchmark.stats.stats.median / NUM_DECODED
    peer_s = benchmark.extra_info["peer_median_s"] / NUM_DECODED
    alone = (peer_s - deep.floor) / max(lowtide_s - deep.floor, 1e-9)
    benchmark.extra_info.update(attention_ratio=alone)
    print(f"{name}: attention alone: {alone:.2f} x; {deep.floor * 1000:.1f} ms for the rest")


@pytest.mark.parametrize("attention", ["dense", "tidal", "tidal:k=512", "tidal:k=1024"])
def test_decode_at_7600(attention: str, benchmark: Any, small: Deep) -> None:
    measure(benchmark, small, f"{attention}, decode at 7,600", attention, rounds=15)


@pytest.mark.parametrize("attention", ["dense", "tidal:k=1024"])
def test_decode_at_32768(attention: str, benchmark: Any, large: Deep) -> None:
    measure(benchmark, large, f"{attention}, 1B shape, decode at 32,768", attention, rounds=7)
