"""Tokens and prompts of a converted folder against onnxruntime-genai on the same folder.

Skipped where onnxruntime-genai is not installed. Each round times it and then ours. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paired import paired

from lowtide.memory.units import GIB
from lowtide.models.header import read_spec
from lowtide.models.onnx.convert.conversion import convert
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_reference

pytestmark = pytest.mark.benchmark
genai = pytest.importorskip("onnxruntime_genai")

TEXT = "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. "
NUM_DECODED = 24
CONTEXT = 1024


class Ours:
    """The folder in our runtime."""

    def __init__(self, folder: Path) -> None:
        options = OpenOptions(memory=8 * GIB, context=CONTEXT, threads=2)
        self.loaded = LoadedModel(plan_reference(folder, options))
        self.model = self.loaded.model
        encode = self.model.tokenizer.encode
        self.token_ids = encode(TEXT * 40, add_special=True, parse_special=False)

    def prefill(self, length: int) -> None:
        self.model.truncate(0)
        rows = self.model.max_rows
        for at in range(0, length, rows):
            self.model.forward(self.token_ids[at : min(at + rows, length)])

    def decode(self, depth: int) -> None:
        self.model.truncate(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            self.model.forward((token_id,)).argmax()


class Theirs:
    """The same folder in onnxruntime-genai, on as many threads."""

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

    def decode(self, depth: int) -> None:
        self.generator.rewind_to(depth)
        for token_id in self.token_ids[depth : depth + NUM_DECODED]:
            self.generator.append_tokens([token_id])


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(read_spec(smollm2), tmp_path_factory.mktemp("converted") / "smollm2").folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[Ours]:
    made = Ours(folder)
    yield made
    made.loaded.close()


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: Ours) -> Theirs:
    return Theirs(folder, list(ours.token_ids))


@pytest.mark.parametrize("depth", [256, 900])
def test_decode(benchmark: Any, ours: Ours, theirs: Theirs, depth: int) -> None:
    ours.prefill(depth)
    theirs.prefill(depth)
    paired(
        benchmark,
        f"decode at {depth}",
        lambda: ours.decode(depth),
        lambda: theirs.decode(depth),
        rounds=7,
        peer="onnxruntime-genai",
    )


def test_prefill(benchmark: Any, ours: Ours, theirs: Theirs) -> None:
    paired(
        benchmark,
        "prompt of 512 tokens",
        lambda: ours.prefill(512),
        lambda: theirs.prefill(512),
        rounds=5,
        peer="onnxruntime-genai",
    )
