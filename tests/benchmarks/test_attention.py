"""lowtide's exact attention compared with llama.cpp's, in one context of one model: only the kernel differs.

Each round times llama.cpp's kernel and then lowtide's. The result is the median ratio of the rounds; above 1
means lowtide is faster. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paired import paired

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

pytestmark = pytest.mark.benchmark

TEXT = "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. "
NUM_DECODED = 16
ROWS = 128


class Bench:
    """A model with a hook, whose KV cache is filled up to the last requested depth."""

    def __init__(self, path: Path) -> None:
        self.hook = LlamaHook(threads=2)
        options = LoadOptions(
            context=8192, batch_size=ROWS, threads=2, eval_callback=self.hook.callback
        )
        self.model = GgufModel(read_spec(path), options)
        self.token_ids = self.model.tokenizer.encode(
            TEXT * 500, add_special=True, parse_special=False
        )
        self.filled = 0

    def fill(self, depth: int) -> None:
        self.model.truncate(self.filled)
        for at in range(self.filled, depth, ROWS):
            self.model.forward(self.token_ids[at : min(at + ROWS, depth)])
        self.filled = depth

    def decode(self, active: bool, depth: int) -> None:
        self.hook.set_active(active)
        self.model.truncate(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            self.model.forward((token_id,))

    def prefill(self, active: bool, length: int, use_bf16: bool = False) -> None:
        self.hook.set_active(active)
        self.hook.start_pass(sparse=False, use_bf16=use_bf16)
        self.model.truncate(0)
        for at in range(0, length, ROWS):
            self.model.forward(self.token_ids[at : min(at + ROWS, length)])


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    bench = Bench(smollm2)
    yield bench
    bench.model.close()
    bench.hook.close()


@pytest.mark.parametrize("depth", [256, 2048, 4096, 7600])
def test_decode(benchmark: Any, bench: Bench, depth: int) -> None:
    bench.fill(depth)
    paired(
        benchmark,
        f"attention dense, decode at {depth}",
        lambda: bench.decode(True, depth),
        lambda: bench.decode(False, depth),
        rounds=15,
    )


@pytest.mark.parametrize("length", [256, 512, 4096, 7600])
@pytest.mark.parametrize("prompts", ["exact", "bf16"])
def test_prefill(benchmark: Any, bench: Bench, length: int, prompts: str) -> None:
    if prompts == "bf16" and not bench.hook.supports_bf16:
        pytest.skip("this processor has no avx512_bf16")
    before, passes = bench.hook.counts().seconds, 3 if length > 1000 else 9
    paired(
        benchmark,
        f"attention dense, prompts {prompts}, prefill of {length}",
        lambda: bench.prefill(True, length, prompts == "bf16"),
        lambda: bench.prefill(False, length),
        rounds=passes,
    )
    attention_s = (bench.hook.counts().seconds - before) / (passes + 1)
    rest_s = benchmark.stats.stats.median - attention_s
    alone = (benchmark.extra_info["peer_median_s"] - rest_s) / attention_s
    print(f"  attention alone: {alone:.2f} x; {attention_s:.2f} s, and {rest_s:.2f} s for the rest")
    bench.filled = 0
