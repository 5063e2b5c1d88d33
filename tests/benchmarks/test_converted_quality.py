"""How far the next tokens of a converted folder are from the GGUF run of the same weights, packed and not.

Two texts, 300 tokens each behind 384, with our exact attention everywhere: only products and what lies
between them differ. The GGUF run's own two ways of multiplying are held against each other, too.
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
"""Where in the essays a text begins."""


def loaded(path: Path, *, repack: bool) -> Engine:
    options = LoadConfig(memory=8 * GIB, context=1024, threads=2, attention="dense", repack=repack)
    return Engine(plan_reference(path, options))


def texts(path: Path) -> list[list[int]]:
    made, text = loaded(path, repack=False), essays()
    try:
        encode = made.model.tokenizer.encode
        parts = [text[int(len(text) * share) :][:8000] for share in SHARES]
        return [encode(part, add_special=True, parse_special=False) for part in parts]
    finally:
        made.close()


def distributions(path: Path, token_ids: list[list[int]], *, repack: bool) -> np.ndarray:
    """Log probabilities after each of the compared tokens, (texts, tokens, vocabulary)."""
    made, found = loaded(path, repack=repack), []
    try:
        for ids in token_ids:
            made.model.truncate(0)
            for at in range(0, NUM_READ, ROWS):
                made.model.forward(ids[at : at + ROWS])
            compared = ids[NUM_READ : NUM_READ + NUM_COMPARED]
            rows = [np.array(made.model.forward((t,)), np.float64) for t in compared]
            found.append([row - np.logaddexp.reduce(row) for row in rows])
        return np.array(found)
    finally:
        made.close()


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_how_far_from_the_gguf_run(benchmark: Any, tmp_path: Path, name: str) -> None:
    path = resolve(name)
    folder = convert(read_spec(path), tmp_path / name).folder
    token_ids = texts(path)
    found: dict[str, np.ndarray] = {}

    def measure() -> None:
        for model, words in ((path, "GGUF"), (folder, "ONNX")):
            for repack in (False, True):
                kind = f"{words}, packed" if repack else words
                found[kind] = distributions(model, token_ids, repack=repack)

    benchmark.pedantic(measure, rounds=1)
    wanted = found.pop("GGUF")
    for kind, rows in found.items():
        kl = (np.exp(wanted) * (wanted - rows)).sum(axis=2).mean(axis=1)
        print(f"\n{name}, {kind}: KL to llama.cpp's GGUF run {kl[0]:.4f} and {kl[1]:.4f}")
