"""Models that do not generate text are refused while planning, by what their header and llama.cpp say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from encoders import write_encoder, write_t5
from gguf_files import write_model
from onnx_decoders import write_decoder

from lowtide import Runtime
from lowtide.cli.main import main
from lowtide.models.errors import LowtideError, UnsupportedModel
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.kind import DECODER, ENCODER, ENCODER_DECODER

Write = Callable[[Path], Path]
ENCODERS: dict[str, Write] = {
    "bert": write_encoder,
    "a bert whose header does not say that it is not causal": partial(write_encoder, causal=None),
    "the encoder of t5": partial(write_t5, decoder=False),
}


def test_the_header_says_what_a_model_is(tmp_path: Path) -> None:
    assert read_spec(write_model(tmp_path / "llama.gguf")).kind == DECODER
    assert read_spec(write_encoder(tmp_path / "bert.gguf")).kind == ENCODER
    assert read_spec(write_t5(tmp_path / "t5.gguf")).kind == ENCODER_DECODER
    assert read_spec(write_t5(tmp_path / "enc.gguf", decoder=False)).kind == ENCODER


def test_the_header_says_how_tokens_are_pooled(tmp_path: Path) -> None:
    assert read_spec(write_encoder(tmp_path / "cls.gguf")).pooling == "cls"
    assert read_spec(write_encoder(tmp_path / "mean.gguf", pooling=1)).pooling == "mean"
    assert read_spec(write_encoder(tmp_path / "none.gguf", pooling=None)).pooling is None
    assert read_spec(write_encoder(tmp_path / "odd.gguf", pooling=77)).pooling is None


@pytest.mark.parametrize("write", ENCODERS.values(), ids=list(ENCODERS))
@pytest.mark.parametrize("command", [["plan"], ["run", "-p", "hi"], ["run", "--raw", "-p", "hi"]])
def test_an_encoder_is_refused_by_name(tmp_path: Path, write: Write, command: list[str]) -> None:
    path = write(tmp_path / "model.gguf")
    done = CliRunner().invoke(main, [*command, str(path)])
    assert done.exit_code == 2, done.output
    assert "model is an encoder (" in done.output
    assert "`lowtide embed`" in done.output


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    path = write_t5(tmp_path / "t5.gguf")
    done = CliRunner().invoke(main, ["run", "--raw", "-p", "hi", str(path)])
    assert done.exit_code == 2, done.output
    assert "t5 is an encoder-decoder (t5)" in done.output


def test_python_refuses_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"is an encoder .* lowtide\.Embedder"):
        Runtime.open(write_encoder(tmp_path / "bert.gguf"), memory="1GiB")


def test_an_onnx_model_is_refused_to_embed(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    done = CliRunner().invoke(main, ["embed", "--model", str(folder), "hi"])
    assert done.exit_code == 2, done.output
    assert "is an ONNX model, and lowtide embeds with GGUF models" in done.output
    with Runtime.open(folder) as runtime, pytest.raises(LowtideError, match="GGUF"):
        runtime.embed(["hi"])


def test_an_encoder_drafts_nothing(tmp_path: Path) -> None:
    model, draft = write_model(tmp_path / "m.gguf"), write_encoder(tmp_path / "bert.gguf")
    with pytest.raises(UnsupportedModel, match="bert is an encoder"):
        Runtime.open(model, memory="1GiB", speculate=str(draft))


def test_doctor_says_what_a_model_is_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", str(write_encoder(tmp_path / "bert.gguf"))])
    assert "bert is an encoder: `lowtide embed` embeds with it" in done.output
    assert "Problem: bert" not in done.output
