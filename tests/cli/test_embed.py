"""`lowtide embed`: texts from arguments, files and standard input; plain, JSON and numpy output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from encoders import write_encoder
from gguf_files import write_model

from lowtide import Embedder
from lowtide.cli.main import main

TEXTS = ["hello you", "a", "naïve 漢字"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "bert.gguf")


@pytest.fixture
def expected(bert: Path) -> np.ndarray:
    with Embedder.open(bert, memory="1GiB") as embedder:
        return embedder.embed(TEXTS)


def embed(model: Path, *arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["embed", "-m", str(model), *arguments], input=input)


def plain(text: str) -> np.ndarray:
    return np.array([line.split(" ") for line in text.splitlines()], np.float32)


def test_texts_are_arguments(bert: Path, expected: np.ndarray) -> None:
    done = embed(bert, *TEXTS)
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(plain(done.stdout), expected, atol=1e-4)
    assert "encoder · pooling cls · texts of up to 512 tokens" in done.stderr


def test_texts_are_lines(bert: Path, expected: np.ndarray, tmp_path: Path) -> None:
    lines = "\n".join(TEXTS)
    (tmp_path / "texts.txt").write_text(lines, encoding="utf-8-sig")
    for done in (
        embed(bert, "-f", str(tmp_path / "texts.txt")),
        embed(bert, input=lines + "\r\n"),
        embed(bert, "-f", "-", input=lines),
    ):
        assert done.exit_code == 0, done.output
        np.testing.assert_allclose(plain(done.stdout), expected, atol=1e-4)


def test_json_is_one_object(bert: Path, expected: np.ndarray, tmp_path: Path) -> None:
    found = json.loads(embed(bert, "--json", *TEXTS).stdout)
    np.testing.assert_allclose(found["embeddings"], expected, atol=1e-4)
    assert (found["pooling"], found["normalized"], found["width"]) == ("cls", True, 64)
    assert {"embeddings", "KV cache"} <= {row["component"] for row in found["plan"]["rows"]}
    out = tmp_path / "out.json"
    assert embed(bert, "--json", "-o", str(out), *TEXTS).exit_code == 0
    assert json.loads(out.read_text())["embeddings"] == found["embeddings"]


def test_json_without_pooling_has_a_vector_for_each_token(bert: Path) -> None:
    found = json.loads(embed(bert, "--json", "--pooling", "none", "a", "b c").stdout)
    assert np.array(found["embeddings"][0]).shape == (3, 64)
    assert np.array(found["embeddings"][1]).shape == (4, 64)


@pytest.mark.parametrize("count", [1, 9, 1234])
def test_numpy_files(bert: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "out.npy"
    done = embed(bert, "-o", str(out), input="".join(f"word{i}\n" for i in range(count)))
    assert done.exit_code == 0, done.output
    vectors = np.load(out)
    assert vectors.shape == (count, 64)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_vectors_keep_their_length(bert: Path) -> None:
    lengths = np.linalg.norm(plain(embed(bert, "--no-normalize", *TEXTS).stdout), axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()


def test_a_decoder_says_how_it_pools(tmp_path: Path) -> None:
    done = embed(write_model(tmp_path / "m.gguf"), "hello")
    assert done.exit_code == 0, done.output
    assert "decoder · pooling mean, because the header names none" in done.stderr


def test_long_texts(bert: Path) -> None:
    refused = embed(bert, "-c", "20", "a", "b " * 30)
    assert refused.exit_code == 2
    assert "text 2 has 32 tokens" in refused.output
    assert "--overflow truncate" in refused.output
    cut = embed(bert, "-c", "20", "--overflow", "truncate", "a", "b " * 30)
    assert cut.exit_code == 0
    assert "text 2 has 32 tokens; its first 20 tokens are embedded" in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-f", "missing.txt"], "cannot read missing.txt"),
        (["-f", "x.txt", "a"], "exclude each other"),
        (["--json", "-o", "x.npy", "a"], "--json does not write"),
        (["--pooling", "none", "-o", "x.npy", "a"], "different lengths"),
        (["--memory", "5MiB", "a"], "raise --memory to"),
        (["-o", "/nowhere/at/all.npy", "a"], "/nowhere/at"),
        ([], "no text"),
    ],
)
def test_wrong_use(bert: Path, arguments: list[str], message: str) -> None:
    done = embed(bert, *arguments, input="")
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_input_that_is_not_utf8(bert: Path) -> None:
    done = embed(bert, input=b"a\n\xff\xfe\xfd\n")
    assert done.exit_code == 2
    assert "UTF-8" in done.output
