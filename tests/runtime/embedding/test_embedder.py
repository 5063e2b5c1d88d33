"""Embeddings: equal to llama-cpp-python's, independent of the batch, inside the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from encoders import write_encoder, write_t5
from gguf_files import write_model
from processes import run_python

from lowtide import Embedder, LowtideError, OverBudget, Runtime
from lowtide.memory.units import MIB
from lowtide.models.errors import BadOption, LowtideWarning, UnsupportedModel
from lowtide.runtime.errors import ForwardError, RuntimeUnusable, TextTooLong

Write = Callable[[Path], Path]
TEXTS = ["hello you", "", "a", "word7 word8 word9", "hello you", "naïve 漢字 🌊", "b " * 60]
MODELS: dict[str, Write] = {
    "bert, cls": write_encoder,
    "bert, mean": partial(write_encoder, pooling=1),
    "t5": write_t5,
    "the encoder of t5": partial(write_t5, decoder=False),
    "llama": write_model,
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = request.param(tmp_path / "model.gguf")
    return path


def test_the_vectors_do_not_depend_on_the_batch(model: Path) -> None:
    with Embedder.open(model, memory="4GiB") as embedder:
        together = embedder.embed(TEXTS)
        alone = np.concatenate([embedder.embed(text) for text in TEXTS])
        assert together.dtype == np.float32
        assert together.shape == (len(TEXTS), embedder.spec.embedding_width)
        np.testing.assert_allclose(together, alone, atol=1e-4)
        np.testing.assert_allclose(together[0], together[4], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert np.abs(together[0] - together[3]).max() > 0.01
        assert embedder.embed([]).shape == (0, embedder.width)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_takes_the_vectors_of_tokens(tmp_path: Path, pooling: str) -> None:
    path = write_encoder(tmp_path / "bert.gguf")
    with Embedder.open(path, memory="4GiB", pooling="none") as embedder:
        each = embedder.embed_tokens(TEXTS, normalize=False)
    expected = {
        "mean": [tokens.mean(0) for tokens in each],
        "cls": [tokens[0] for tokens in each],
        "last": [tokens[-1] for tokens in each],
    }[pooling]
    with Embedder.open(path, memory="4GiB", pooling=pooling) as embedder:
        np.testing.assert_allclose(embedder.embed(TEXTS, normalize=False), expected, atol=2e-3)


ORACLE = """
import sys, llama_cpp, numpy as np
path, out, *texts = sys.argv[1:]
llama = llama_cpp.Llama(path, embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, verbose=False,
                        pooling_type={pooling}, n_threads=1)
np.save(out, np.array([llama.embed(text, normalize=True) for text in texts], np.float32))
"""


@pytest.mark.real
@pytest.mark.parametrize("name", ["bert, cls", "bert, mean", "llama"])
def test_the_vectors_are_those_of_llama_cpp_python(tmp_path: Path, name: str) -> None:
    import subprocess
    import sys

    path, out = MODELS[name](tmp_path / "model.gguf"), tmp_path / "out.npy"
    texts = [text for text in TEXTS if text]
    program = ORACLE.replace("{pooling}", "1" if name == "llama" else "-1")
    subprocess.run([sys.executable, "-c", program, path, out, *texts], check=True, timeout=120)
    with Embedder.open(path, memory="4GiB") as embedder:
        np.testing.assert_allclose(embedder.embed(texts), np.load(out), atol=2e-3)


def test_a_runtime_embeds_with_the_decoder_that_it_generates_with(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    with Embedder.open(path, memory="4GiB") as embedder:
        expected = embedder.embed(TEXTS)
    with Runtime.open(path, memory="4GiB", threads=1) as runtime:
        plain = runtime.generate("word7", max_tokens=4, temperature=0).token_ids
        reserved = runtime.ledger.reserved_bytes
        np.testing.assert_allclose(runtime.embed(TEXTS), expected, atol=1e-4)
        assert runtime.embed("one").shape == (1, 64)
        assert runtime.ledger.reserved_bytes == reserved
        assert runtime.generate("word7", max_tokens=4, temperature=0).token_ids == plain
        with pytest.raises(BadOption, match="pooling"):
            runtime.embed("a", pooling="none")


def test_a_stream_is_closed_from_inside_its_step(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        for number in range(5):
            if number == 2:
                stream.close()
            yield f"word{number}"

    path = write_encoder(tmp_path / "bert.gguf")
    with Embedder.open(path, memory="4GiB", batch_size=4) as embedder:
        stream = embedder.stream(texts())
        assert len(list(stream)) < 5


def test_a_runtime_of_a_users_model_does_not_embed(fake_runtime: Callable[..., Runtime]) -> None:
    with fake_runtime() as runtime, pytest.raises(UnsupportedModel, match="cannot embed"):
        runtime.embed("a")


def test_a_text_that_is_too_long_is_refused_or_cut(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "bert.gguf")
    long = ["a", "b " * 100]
    with (
        Embedder.open(path, memory="4GiB", context=50) as embedder,
        pytest.raises(TextTooLong, match=r"text 2 has 102 tokens, and texts of up to 50 tokens"),
    ):
        embedder.embed(long)
    with Embedder.open(path, memory="4GiB", context=50, overflow="truncate") as embedder:
        with pytest.warns(LowtideWarning, match="text 2 has 102 tokens; its first 50"):
            cut = embedder.embed(long)
        # The first 48 words, and [CLS] and [SEP] around them.
        np.testing.assert_allclose(cut[1], embedder.embed("b " * 48)[0], atol=1e-5)
        with pytest.warns(LowtideWarning, match="more than 16,384 bytes"):
            embedder.embed("b" * 20_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "rank"}, "pooling is 'rank'"),
        ({"overflow": "drop"}, "overflow is 'drop'"),
        ({"context": 513}, "context is 513 tokens, but bert was trained for 512"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"kv_type": "f16"}, "unknown option 'kv_type'"),
        ({"memory": "x"}, "memory"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = write_encoder(tmp_path / "bert.gguf")
    with pytest.raises(LowtideError, match=message) as caught:
        Embedder.open(path, **{"memory": "4GiB", **options})
    assert caught.value.exit_code == 2


def test_a_reranker_is_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "bert.gguf", pooling=4)
    with pytest.raises(UnsupportedModel, match="bert is a reranker"):
        Embedder.open(path, memory="4GiB")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with Embedder.open(write_encoder(tmp_path / "bert.gguf"), memory="4GiB") as embedder:
        with pytest.raises(BadOption, match="text 2 is 5"):
            embedder.embed(["a", 5])  # type: ignore[list-item]
        embedder.close()
        embedder.close()
        with pytest.raises(RuntimeUnusable, match="closed"):
            embedder.embed("a")


def test_a_budget_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "bert.gguf")
    with pytest.raises(OverBudget, match="raise memory to"):
        Embedder.open(path, memory="8MiB")


PEAK = """
import warnings
warnings.simplefilter("ignore")
from lowtide import Embedder
with Embedder.open({path!r}, memory="{memory}MiB", threads=1, overflow="truncate") as embedder:
    long = "word7 " * (embedder.plan.context)
    vectors = embedder.embed([*["word7 word8"] * 600, long, "a"])
    assert vectors.shape == (602, 256)
    assert embedder.plan.total_bytes <= {memory} << 20
"""


@pytest.mark.real
@pytest.mark.parametrize("write", [write_encoder, write_model], ids=["encoder", "decoder"])
@pytest.mark.parametrize("memory", [120, 180])
def test_the_peak_is_inside_the_budget(
    tmp_path: Path, write: Callable[..., Path], memory: int
) -> None:
    shape = {"width": 256, "heads": 4, "vocabulary": 20_000, "context": 4096}
    path = write(tmp_path / "model.gguf", **shape)
    done = run_python(PEAK.format(path=str(path), memory=memory))
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= memory * MIB


def test_an_encoder_that_ggml_cannot_compute_is_refused(tmp_path: Path) -> None:
    """A failed assertion of a pass ends the process where nothing guards it."""
    path = write_encoder(
        tmp_path / "halves.gguf",
        changed=lambda name, values: values.astype(np.float16) if "norm" in name else values,
    )
    with pytest.raises(
        ForwardError, match="cannot compute .*halves.gguf.* has a type that is unusual"
    ):
        Embedder.open(path, memory="4GiB")


def test_vectors_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    def with_nan(name: str, values: np.ndarray) -> np.ndarray:
        if name == "blk.1.ffn_up.bias":
            values[3] = np.nan
        return values

    path = write_encoder(tmp_path / "nan.gguf", changed=with_nan)
    with (
        Embedder.open(path, memory="4GiB") as embedder,
        pytest.raises(ForwardError, match="the embeddings are not numbers"),
    ):
        embedder.embed("hello")


FORKED = """
import os, sys
from lowtide import Embedder
from lowtide.runtime.errors import RuntimeUnusable
embedder = Embedder.open(PATH, memory="4GiB", threads=2)
embedder.embed("hello")
pid = os.fork()
if pid == 0:
    try:
        embedder.embed("hello")
    except RuntimeUnusable as error:
        os._exit(0 if "forked" in str(error) else 4)
    os._exit(3)
assert os.waitpid(pid, 0)[1] == 0
embedder.close()
"""


def test_a_forked_child_is_refused_the_embedder(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "bert.gguf")
    done = run_python(f"PATH = {str(path)!r}\n{FORKED}", timeout=60)
    assert done.code == 0, done.stderr
