"""Files that are no models, or GGUF of another kind, are named as what they are."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import write_model
from hypothesis import given
from hypothesis import strategies as st

from lowtide import Runtime
from lowtide.models.errors import BadModelFile, UnsupportedModel
from lowtide.models.files.file_kind import wrong_file
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.llama_cpp import plain_reason

HEADER = json.dumps({"__metadata__": {"format": "pt"}}).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (POINTER, "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
        (b"\xef\xbb\xbf\n  <HTML>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"error": "Entry not found"}', "JSON"),
        (struct.pack("<Q", len(HEADER)) + HEADER, "safetensors"),
        (gzip.compress(b"GGUF" * 20, mtime=0), "gzip"),
        (b"\x80\x02}q\x00" + bytes(40), "pickle"),
        (bytes(100), "zeros"),
        (b"tjgg\x03\0\0\0" + bytes(40), "before GGUF"),
        (b"some text of a file that is none of these", "not a GGUF file"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BadModelFile, match=name):
        read_spec(path)


def test_a_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", "x" * 100)
    with pytest.raises(BadModelFile, match="ZIP archive, such as a PyTorch checkpoint"):
        read_spec(path)


@given(st.binary(max_size=80))
def test_any_bytes_make_one_sentence(start: bytes) -> None:
    sentence = wrong_file(Path("m.gguf"), start)
    assert sentence.startswith("m.gguf ") and "\n" not in sentence


def test_a_big_endian_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_name("big")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadModelFile, match="big-endian"):
        read_spec(path)


def test_a_tokenizer_without_its_cutting_rule_is_warned_of(tmp_path: Path) -> None:
    from tiny_gguf import write_pair

    path, _ = write_pair(tmp_path / "m", "llama", "Q8_0", before="smollm")
    assert read_spec(path).warnings == ()
    data = path.read_bytes()
    key = b"tokenizer.ggml.pre"
    assert data.count(key) == 1
    path.write_bytes(data.replace(key, b"tokenizer.ggml.prx"))
    (warning,) = read_spec(path).warnings
    assert key.decode() in warning


def set_type(path: Path, name: str, type_number: int) -> None:
    """Change the type of a tensor in the directory of a file."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name)
    (num_dimensions,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * num_dimensions, type_number)
    path.write_bytes(data)


@pytest.mark.parametrize("type_number", [4, 31, 5000, 0xFFFFFFFF])
def test_a_type_that_ggml_does_not_know_is_named_as_such(tmp_path: Path, type_number: int) -> None:
    path = write_model(tmp_path / "m.gguf")
    set_type(path, "blk.0.attn_q.weight", type_number)
    with pytest.raises(UnsupportedModel, match=f"has type {type_number}, which llama.cpp"):
        read_spec(path)


def test_reasons_name_no_folders_of_the_build() -> None:
    message = "llama_model_load: error loading model: /tmp/a b/x-1/src/llama-vocab.cpp:25: GGML_ASSERT(x) failed"
    assert plain_reason(message.replace("a b", "ab")) == "llama-vocab.cpp:25: GGML_ASSERT(x) failed"
    assert plain_reason("error loading model vocabulary: no merges\n") == "no merges"


@pytest.mark.parametrize("name", ["NVFP4", "Q1_0"])
@pytest.mark.parametrize(
    "options", [{}, {"attention": "dense"}, {"attention": "dense", "repack": True}]
)
def test_types_that_only_the_installed_ggml_knows_run(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = write_model(
        tmp_path / "m.gguf",
        width=256,
        feed_forward=256,
        quantised=name,
        halves=("token_embd", "output."),
    )
    assert name in read_spec(path).tensor_types
    with Runtime.open(path, memory="2GiB", context=64, **options) as runtime:
        result = runtime.generate("ab", max_tokens=3, temperature=0)
        assert 1 <= result.stats.generated_tokens <= 3
