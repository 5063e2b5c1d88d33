"""A converted folder in lowtide compared with onnxruntime-genai: decode and prefill, short and long.

Skipped if onnxruntime-genai is not installed. Each round times it and then lowtide. Run with `make bench`.
LOWTIDE_LONG is the length of the long prompt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from essays import essays
from paired import paired

from lowtide.memory.units import GIB
from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadOption
from lowtide.models.read_spec import read_spec
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark
genai = pytest.importorskip("onnxruntime_genai")

NUM_DECODED = 24
PAUSE_S = 0.3
LONG = int(os.environ.get("LOWTIDE_LONG", "7600"))
CONTEXT = LONG + 512
BF16 = "dense:prompts=bf16"
TIDAL = "tidal:k=1536,layers=4+7+18+21"


class Lowtide:
    """The folder in lowtide, with the attention and matmul of the graph ("llama") or of lowtide."""

    def __init__(self, folder: Path, attention: str, *, repack: bool = False) -> None:
        options = LoadConfig(
            memory=8 * GIB, context=CONTEXT, threads=2, attention=attention, repack=repack
        )
        self.label = attention.partition(",")[0] + (", repacked" if repack else "")
        self.loaded = Engine(plan_reference(folder, options))
        self.model = self.loaded.model
        self.token_ids = self.model.tokenizer.encode(
            essays(), add_special=True, parse_special=False
        )

    def prefill(self, length: int) -> None:
        self.model.truncate(0)
        self.loaded.controller.begin_prefill()
        rows = self.model.batch_size
        for at in range(0, length, rows):
            self.model.forward(self.token_ids[at : min(at + rows, length)])

    def decode(self, depth: int) -> None:
        for _ in self.logits(depth, NUM_DECODED):
            pass

    def logits(self, depth: int, count: int) -> Iterator[np.ndarray]:
        """Yield the logits after each of `count` tokens of the text, from `depth` on."""
        self.model.truncate(depth)
        for token_id in self.token_ids[depth : depth + count]:
            self.loaded.controller.begin_decode()
            yield self.model.forward((token_id,))


class Genai:
    """The same folder in onnxruntime-genai, with the same number of threads."""

    def __init__(self, folder: Path, token_ids: list[int]) -> None:
        config = genai.Config(str(folder))
        options = '{"intra_op_num_threads": 2}'
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
        self.model = genai.Model(config)
        self.token_ids = token_ids
        self.generator = self._generator()

    def _generator(self) -> Any:
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        return genai.Generator(self.model, params)

    def prefill(self, length: int) -> None:
        self.generator = self._generator()
        self.generator.append_tokens(self.token_ids[:length])
        self.generator.get_logits()

    def decode(self, depth: int) -> None:
        self.generator.truncate_to_prefix(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            self.generator.append_tokens([token_id])
            self.generator.get_logits()


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(read_spec(smollm2), tmp_path_factory.mktemp("converted") / "smollm2").folder


@pytest.fixture(
    scope="module",
    params=[
        *(("llama", False), ("dense", False), (TIDAL, False)),
        *(("dense", True), (TIDAL, True), (BF16, True)),
    ],
    ids=["graph", "dense", "tidal", "dense-repacked", "tidal-repacked", "bf16-repacked"],
)
def lowtide(request: pytest.FixtureRequest, folder: Path) -> Iterator[Lowtide]:
    attention, repack = request.param
    try:
        made = Lowtide(folder, attention, repack=repack)
    except BadOption as reason:
        pytest.skip(str(reason))
    yield made
    made.loaded.close()


@pytest.fixture(scope="module")
def peer(folder: Path) -> Genai:
    dense = Lowtide(folder, "dense")
    token_ids = list(dense.token_ids)
    dense.loaded.close()
    return Genai(folder, token_ids)


@pytest.mark.parametrize("depth", [256, LONG])
def test_decode(benchmark: Any, lowtide: Lowtide, peer: Genai, depth: int) -> None:
    lowtide.prefill(depth)
    peer.prefill(depth)
    paired(
        benchmark,
        f"{lowtide.label}: decode at {depth}",
        lambda: lowtide.decode(depth),
        lambda: peer.decode(depth),
        rounds=9,
        peer="onnxruntime-genai",
        pause_s=PAUSE_S,
    )


@pytest.mark.parametrize("length", [512, LONG])
def test_prefill(benchmark: Any, lowtide: Lowtide, peer: Genai, length: int) -> None:
    paired(
        benchmark,
        f"{lowtide.label}: prompt of {length} tokens",
        lambda: lowtide.prefill(length),
        lambda: peer.prefill(length),
        rounds=5 if length < LONG else 1,
        peer="onnxruntime-genai",
        pause_s=PAUSE_S,
    )


def test_divergence_of_tidal(benchmark: Any, folder: Path) -> None:
    """Mean KL divergence from dense attention over 256 tokens after the long prompt."""
    found: list[list[np.ndarray]] = []

    def measure() -> None:
        for attention in ("dense", TIDAL):
            made = Lowtide(folder, attention)
            made.prefill(LONG)
            found.append([row.astype(np.float64) for row in made.logits(LONG, 256)])
            made.loaded.close()

    benchmark.pedantic(measure, rounds=1)
    divergences = []
    for dense, tidal in zip(*found, strict=True):
        one, other = (row - np.logaddexp.reduce(row) for row in (dense, tidal))
        divergences.append(float((np.exp(one) * (one - other)).sum()))
    print(f"\n{TIDAL} at {LONG}: KL {np.mean(divergences):.4f} nats/token from dense attention")
