"""SmolLM2 as an ONNX folder: its next tokens against the GGUF file's, and its plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from essays import essays

from lowtide import Runtime
from lowtide.attention.quality import log_softmax
from lowtide.models.header import read_spec
from lowtide.models.onnx.convert.conversion import convert

NUM_TOKENS = 96
MOST_KL = 5e-3
"""Nats a token. Both round activations to 8 bits and sum in another order, which costs each about 0.003
against float32; what the conversion itself loses is in test_conversion.py, without such rounding."""


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = convert(read_spec(smollm2), tmp_path_factory.mktemp("converted") / "smollm2")
    assert not made.rounded and made.num_bytes < 1.2 * smollm2.stat().st_size
    return made.folder


def read(model: Path, text: str) -> tuple[list[int], np.ndarray]:
    """Return a text's ids and the log probabilities after each."""
    with Runtime.open(model, memory="4GiB", context=512, threads=2) as runtime:
        ids = runtime._model.tokenizer.encode(text, add_special=True, parse_special=False)
        found = [log_softmax(runtime._model.forward((i,))) for i in ids[:NUM_TOKENS]]
        return ids, np.stack(found)


def test_next_tokens_are_the_files(smollm2: Path, folder: Path) -> None:
    text = essays()[3000:43000]
    ids, wanted = read(smollm2, text)
    own_ids, found = read(folder, text)
    assert own_ids == ids and len(ids) > 5000
    divergence = (np.exp(wanted) * (wanted - found)).sum(axis=1).mean()
    assert 0 <= divergence <= MOST_KL
    assert (wanted.argmax(axis=1) == found.argmax(axis=1)).mean() > 0.9
