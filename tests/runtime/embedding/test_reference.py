"""Embeddings equal those of an independent BERT in numpy, with each pooling, normalised or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bert_reference import token_vectors
from encoders import write_encoder

from lowtide import Embedder

TEXTS = ["hello you", "a", "word7 word8 word9, again.", "naïve 漢字 🌊", "b " * 60]
POOLED = {
    "mean": lambda vectors: vectors.mean(0),
    "cls": lambda vectors: vectors[0],
    "last": lambda vectors: vectors[-1],
}


@pytest.mark.parametrize("pooling", [*POOLED, "none"])
def test_vectors_are_those_of_the_reference(tmp_path: Path, pooling: str) -> None:
    tensors: dict[str, np.ndarray] = {}
    random = np.random.default_rng(2)

    def changed(name: str, values: np.ndarray) -> np.ndarray:
        if values.ndim == 1:  # norms and biases that are not 1 and 0
            values = values + random.normal(0, 0.1, values.shape).astype(np.float32)
        tensors[name] = values
        return values

    path = write_encoder(tmp_path / "bert.gguf", changed=changed)
    with Embedder.open(path, memory="1GiB", pooling=pooling, threads=1) as embedder:
        encode = embedder._model.tokenizer.encode
        expected = [
            token_vectors(tensors, encode(text, add_special=True, parse_special=False), heads=4)
            for text in TEXTS
        ]
        if pooling == "none":
            for found, vectors in zip(
                embedder.embed_tokens(TEXTS, normalize=False), expected, strict=True
            ):
                np.testing.assert_allclose(found, vectors, atol=5e-3)
            return
        pooled = np.array([POOLED[pooling](vectors) for vectors in expected])
        np.testing.assert_allclose(embedder.embed(TEXTS, normalize=False), pooled, atol=5e-3)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        np.testing.assert_allclose(embedder.embed(TEXTS), pooled, atol=2e-3)
