"""KL divergence of a converted ONNX folder from the original GGUF model, with and without repacked weights.

Two texts, 300 tokens each after a prefix of 384, with lowtide's exact attention everywhere: only matrix
multiplications and element-wise operations differ. The GGUF model with repacked weights is compared as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from essays import essays

from lowtide.memory.units import GIB
from lowtide.models.catalog import resolve
from lowtide.models.convert.convert import convert
from lowtide.models.read_spec import read_spec
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark

NUM_READ, NUM_COMPARED, ROWS = 384, 300, 128
SHARES = (0.0, 0.5)
"""The start of each text, as a share of the essays."""


def loaded(path: Path, *, repack: bool) -> Engine:
    options = LoadConfig(memory=8 * GIB, context=1024, threads=2, attention="dense", repack=repack)
    return Engine(plan_reference(path, options))


def texts(path: Path) -> list[list[int]]:
    engine, text = loaded(path, repack=False), essays()
    try:
        encode = engine.model.tokenizer.encode
        parts = [text[int(len(text) * share) :][:8000] for share in SHARES]
        return [encode(part, add_special=True, parse_special=False) for part in parts]
    finally:
        engine.close()


def distributions(path: Path, token_ids: list[list[int]], *, repack: bool) -> np.ndarray:
    """Return log probabilities after each compared token, shape (texts, tokens, vocabulary)."""
    engine, found = loaded(path, repack=repack), []
    try:
        for ids in token_ids:
            engine.model.truncate(0)
            for at in range(0, NUM_READ, ROWS):
                engine.model.forward(ids[at : at + ROWS])
            compared = ids[NUM_READ : NUM_READ + NUM_COMPARED]
            rows = [np.array(engine.model.forward((t,)), np.float64) for t in compared]
            found.append([row - np.logaddexp.reduce(row) for row in rows])
        return np.array(found)
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_divergence_from_the_gguf_model(benchmark: Any, tmp_path: Path, name: str) -> None:
    path = resolve(name)
    folder = convert(read_spec(path), tmp_path / name).folder
    token_ids = texts(path)
    found: dict[str, np.ndarray] = {}

    def measure() -> None:
        for model, format in ((path, "GGUF"), (folder, "ONNX")):
            for repack in (False, True):
                kind = f"{format}, repacked" if repack else format
                found[kind] = distributions(model, token_ids, repack=repack)

    benchmark.pedantic(measure, rounds=1)
    expected = found.pop("GGUF")
    for kind, rows in found.items():
        kl = (np.exp(expected) * (expected - rows)).sum(axis=2).mean(axis=1)
        print(f"\n{name}, {kind}: KL {kl[0]:.4f} and {kl[1]:.4f} nats/token from llama.cpp")
