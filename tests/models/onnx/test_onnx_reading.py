"""ONNX folders are read without their weights, and broken ones are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx_decoders import FORMS, Shape, write_decoder
from onnx_folders import write_genai_config, write_optimum_config, write_tokenizer

from lowtide.models.errors import BadModelFile, LowtideError, ModelNotFound, UnsupportedModel
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.tokenizer import OnnxTokenizer
from lowtide.models.read_spec import read_spec


def read(path: Path) -> OnnxSpec:
    spec = read_spec(path)
    assert isinstance(spec, OnnxSpec)
    return spec


@pytest.mark.parametrize("layout", ["genai", "optimum"])
@pytest.mark.parametrize("form", FORMS)
def test_shape(tmp_path: Path, form: str, layout: str) -> None:
    shape = Shape(kv_heads=4 if form == "mha" else 2)
    spec = read(write_decoder(tmp_path / "tiny", form, shape, layout=layout))
    assert spec.name == "tiny" and spec.engine == "onnxruntime"
    assert (spec.num_layers, spec.embedding_width, spec.num_heads) == (2, 64, 4)
    assert spec.num_kv_heads == (shape.kv_heads,) * 2 and spec.key_head_dim == 16
    assert spec.vocabulary.num_tokens == 320 and spec.context_length == 512
    assert spec.kv_types == ("f32",) and spec.quantisation == "float32"
    assert spec.shares_cache == form.startswith("gqa")
    assert spec.end_ids == {257}
    assert (spec.ports.position_ids is None) == (form in ("gqa", "gqa packed"))
    data = tmp_path / "tiny" / "model.onnx.data"
    assert spec.paths == (tmp_path / "tiny" / "model.onnx", data)
    assert spec.file_bytes > spec.weight_bytes > 400_000


def test_weights_inside_the_file(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", external=False)
    spec = read(folder / "model.onnx")
    assert spec.paths == (folder / "model.onnx",)
    assert spec.weight_bytes == read(write_decoder(tmp_path / "other")).weight_bytes


def test_the_fingerprint_depends_on_the_shapes(tmp_path: Path) -> None:
    one = read(write_decoder(tmp_path / "one"))
    assert one.fingerprint == read(write_decoder(tmp_path / "two", layout="optimum")).fingerprint
    other = read(write_decoder(tmp_path / "three", shape=Shape(feed_forward=128)))
    assert one.fingerprint != other.fingerprint


def test_chat_template_from_either_file(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", chat_template="{{ messages[0].content }}")
    assert read(folder).chat_template == "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text("jinja")
    assert read(folder).chat_template == "jinja"


def _cut_graph(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-40])


def _no_protobuf(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x0f" * 500)


def _empty(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def _cut_data(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1000])


def _moved_data(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "model.onnx.data")
    _located(folder, "../model.onnx.data")


def _located(folder: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _domain(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].domain = "com.example"
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _input(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", 1, [1, 3]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


BROKEN: dict[str, tuple[Callable[[Path], object], type[LowtideError], str]] = {
    "cut graph": (_cut_graph, BadModelFile, "not a valid ONNX file"),
    "no protobuf": (_no_protobuf, BadModelFile, "unknown wire type 7"),
    "empty": (_empty, BadModelFile, "is empty"),
    "no graph": (lambda f: (f / "model.onnx").unlink(), ModelNotFound, "no file at"),
    "cut data": (_cut_data, BadModelFile, "is truncated"),
    "no data": (lambda f: (f / "model.onnx.data").unlink(), BadModelFile, "is missing beside"),
    "data outside": (_moved_data, BadModelFile, "outside its folder, which is not allowed"),
    "absolute data": (lambda f: _located(f, "/etc/passwd"), BadModelFile, "is not allowed"),
    "domain": (_domain, UnsupportedModel, "com.example.Gather"),
    "input": (_input, UnsupportedModel, "'pixels'"),
    "no config": (lambda f: (f / "genai_config.json").unlink(), BadModelFile, "neither"),
    "config no JSON": (
        lambda f: (f / "genai_config.json").write_text("{"),
        BadModelFile,
        "cannot be read as JSON",
    ),
    "layers": (
        lambda f: write_genai_config(f, Shape(), num_hidden_layers=3),
        BadModelFile,
        "has no past_key_values.2.key, but .* has 3 layers",
    ),
    "fewer layers": (
        lambda f: write_genai_config(f, Shape(), num_hidden_layers=1),
        UnsupportedModel,
        "past_key_values.1.key",
    ),
    "heads": (
        lambda f: write_genai_config(f, Shape(), num_key_value_heads=2),
        BadModelFile,
        r"shape \(\?, 4, \?, 16\), .* has 2 heads of 16",
    ),
    "negative": (
        lambda f: write_genai_config(f, Shape(), num_hidden_layers=-1),
        BadModelFile,
        "num_hidden_layers is -1",
    ),
    "vocabulary": (
        lambda f: write_genai_config(f, Shape(vocabulary=400)),
        BadModelFile,
        "has 320 logits",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), BadModelFile, "tokenizer.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused(tmp_path: Path, what: str) -> None:
    folder = write_decoder(tmp_path / "tiny")
    breaks, kind, message = BROKEN[what]
    breaks(folder)
    with pytest.raises(kind, match=message):
        read_spec(folder)


def test_a_graph_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", layout="optimum")
    graph = folder / "model.onnx"
    whole = graph.read_bytes()
    for length in range(1, len(whole), 97):
        graph.write_bytes(whole[:length])
        with pytest.raises(LowtideError):
            read_spec(folder)


def test_optimum_config_disagrees(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", layout="optimum")
    write_optimum_config(folder, Shape(), head_dim=32)
    with pytest.raises(BadModelFile, match="has 4 heads of 32"):
        read_spec(folder)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        read_spec(tmp_path / "no.onnx")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    write_tokenizer(folder, 321, None)
    with pytest.raises(BadModelFile, match="has 321 tokens, but the model has 320"):
        OnnxTokenizer(read(folder))


def test_an_invalid_tokenizer(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModelFile, match="cannot be read as a tokenizer"):
        OnnxTokenizer(read(folder))


def test_texts_round_trip_and_control_tokens_need_permission(tmp_path: Path) -> None:
    tokenizer = OnnxTokenizer(read(write_decoder(tmp_path / "tiny")))
    text = "héllo 🌊 <|end|> word3\n"
    plain = tokenizer.encode(text, add_special=True, parse_special=False)
    assert tokenizer.decode(plain) == text and 257 not in plain
    parsed = tokenizer.encode(text, add_special=True, parse_special=True)
    assert 257 in parsed and tokenizer.is_end(257) and not tokenizer.is_end(5)
    assert tokenizer.token_bytes(257) == b""
    assert tokenizer.special_texts == {"bos_token": "<|start|>", "eos_token": "<|end|>"}


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read(write_decoder(tmp_path / "tiny"))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UnsupportedModel, match=r"pip install 'lowtide\[onnx\]'"):
        OnnxTokenizer(spec)
