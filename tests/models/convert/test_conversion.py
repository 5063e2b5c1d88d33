"""GGUF decoders as ONNX folders: the same next tokens, complete folders, and clear errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from tiny_gguf import write_pair

from lowtide import Runtime
from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadOption, ModelError, UnsupportedModel
from lowtide.models.read_spec import read_spec

NEAR = 2e-5
"""A tolerance: llama.cpp stores keys, values and a table of activations in 16 bits."""
TEXT = "tide tide de ti tide\n the Tide é 12 tide de de"


def logits(path: Path, text: str = TEXT, chunks: int = 1) -> tuple[list[int], np.ndarray]:
    """Return a text's tokens and the reference logits after each chunk of `chunks` tokens."""
    with Runtime.open(path, memory="4GiB", context=256, threads=1, reference=True) as runtime:
        model = runtime._model
        ids = model.tokenizer.encode(text, add_special=True, parse_special=False)
        steps = [ids[start : start + chunks] for start in range(0, len(ids), chunks)]
        return ids, np.stack([np.array(model.forward(step), np.float64) for step in steps])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the mean KL divergence of next tokens, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (expected, found))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [
        ("llama", "Q4_1", False),
        ("llama", "Q5_1", True),
        ("gemma3", "Q8_0", True),
        ("gemma3", "Q4_0", False),
        ("qwen2", "Q4_0", True),
        ("qwen3", "Q5_0", True),
    ],
)
def test_next_tokens_are_those_of_the_dequantised_weights(
    tmp_path: Path, architecture: str, kind: str, tied: bool
) -> None:
    quantised, exact = write_pair(tmp_path, architecture, kind, tied=tied)
    converted = convert(read_spec(quantised), tmp_path / "onnx", rows="float32")
    assert not converted.rounded
    ids, expected = logits(exact)
    own_ids, found = logits(converted.folder)
    assert own_ids == ids and len(ids) > 20
    assert divergence(expected, found) < NEAR
    _, in_chunks = logits(converted.folder, chunks=7)
    last = np.append(np.arange(6, len(ids), 7), len(ids) - 1)[: len(in_chunks)]
    assert divergence(expected[last], in_chunks) < NEAR


TEXTS = (
    "tide 1234 12 123,  tide!!\n\n\t tide's TIDE'S\n tide",
    "   leading\r\n\r\n12345 e\u0301é 日本語 🙂  ",
    "<s>tide</s> de<unk>",
)


@pytest.mark.parametrize("before", ["gpt-2", "smollm", "llama-bpe", "qwen2", None])
def test_texts_are_split_alike(tmp_path: Path, before: str | None) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0", before=before)
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    assert vocabulary_facts(folder) == vocabulary_facts(quantised)


def vocabulary_facts(path: Path) -> list[object]:
    """Return how texts are tokenised, and what each token is."""
    with Runtime.open(path, memory="4GiB", context=256, threads=1, reference=True) as runtime:
        tokenizer = runtime._model.tokenizer
        return [
            *(
                tokenizer.encode(text, add_special=True, parse_special=parsed)
                for text in TEXTS
                for parsed in (False, True)
            ),
            *((tokenizer.token_bytes(i), tokenizer.is_end(i)) for i in range(320)),
        ]


def test_rounded_weights_are_reported_and_close(tmp_path: Path) -> None:
    _, exact = write_pair(tmp_path, "llama", "Q8_0")
    converted = convert(read_spec(exact), tmp_path / "onnx", rows="float32")
    assert converted.rounded == {"F32": 50}
    assert 1e-9 < divergence(logits(exact)[1], logits(converted.folder)[1]) < 5e-3


def test_configuration_and_checksums(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "gemma3", "Q8_0")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert model["type"] == "gemma3_text" and model["eos_token_id"] == [2]
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(sums) == {file.name for file in folder.iterdir()} - {"SHA256SUMS"}
    data = (folder / "model.onnx.data").read_bytes()
    assert sums["model.onnx.data"] == hashlib.sha256(data).hexdigest()
    spec = read_spec(folder)
    assert spec.chat_template and spec.vocabulary.num_tokens == 320


def test_the_folder_has_the_fingerprint_of_its_source(tmp_path: Path) -> None:
    """So calibrations apply to it. A graph with an invalid note has a fingerprint of its own."""
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    graph = convert(read_spec(quantised), tmp_path / "onnx").folder / "model.onnx"
    written = read_spec(quantised).fingerprint
    assert read_spec(graph).fingerprint == written
    graph.write_bytes(graph.read_bytes().replace(written.encode(), b"../" + written[3:].encode()))
    own = read_spec(graph).fingerprint
    assert len(own) == 32 and own != written and "." not in own


def test_an_older_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(BadOption, match="exists.*--force"):
        convert(read_spec(quantised), folder)
    with pytest.raises(BadOption, match="was not made by lowtide convert and would be deleted"):
        convert(read_spec(quantised), folder, replace=True)
    assert (folder / "old").read_text() == "old"
    (folder / "SHA256SUMS").touch()
    convert(read_spec(quantised), folder, replace=True)
    assert not (folder / "old").exists() and (folder / "model.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "exact.gguf",
        "onnx",
        "quantised.gguf",
    ]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q4_0")
    before = sorted(tmp_path.iterdir())

    def full_disk(num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="cannot be written .No space left on device.: make room"):
        convert(read_spec(quantised), tmp_path / "onnx", advance=full_disk)
    assert sorted(tmp_path.iterdir()) == before


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    other = write_model(tmp_path / "phi.gguf", architecture="phi2")
    with pytest.raises(UnsupportedModel, match="the architecture is 'phi2'; only llama, gemma3"):
        convert(read_spec(other), tmp_path / "onnx")
    partial = write_model(tmp_path / "part.gguf", overrides={"rope.dimension_count": 8})
    with pytest.raises(UnsupportedModel, match="only a part of each head"):
        convert(read_spec(partial), tmp_path / "onnx")
    more = tmp_path / "more.gguf"
    write_pair(tmp_path, "llama", "Q4_0")
    data = (tmp_path / "quantised.gguf").read_bytes()
    name = b"token_embd.weight" + (2).to_bytes(4, "little")
    at = data.index(name) + len(name) + 16
    assert data[at : at + 4] == (2).to_bytes(4, "little"), "the number of Q4_0"
    more.write_bytes(data[:at] + (20).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(UnsupportedModel, match="token_embd.weight is IQ4_NL; only Q4_0, Q4_1"):
        convert(read_spec(more), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
