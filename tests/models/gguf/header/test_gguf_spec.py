from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.errors import BadModelFile
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec


def test_the_default_model(smollm2_spec: ModelSpec, smollm2: Path) -> None:
    spec = smollm2_spec
    assert (spec.architecture, spec.quantisation, spec.num_layers) == ("llama", "Q4_1", 30)
    assert (spec.num_heads, set(spec.num_kv_heads), spec.key_head_dim) == (9, {3}, 64)
    assert spec.vocabulary.num_tokens == 49152
    assert spec.context_length == 8192
    assert spec.file_bytes == smollm2.stat().st_size
    assert 0.97 < spec.weight_bytes / spec.file_bytes < 1
    assert "<|im_start|>" in (spec.chat_template or "")
    assert spec.sliding_window is None


def test_reading_a_spec_reads_no_weights(smollm2: Path) -> None:
    """The peak of a process that reads the headers of a 98 MB file stays near the interpreter's."""
    from processes import run_python

    done = run_python(
        "from lowtide.models.gguf.header.spec import read_spec; from pathlib import Path;"
        f"print(read_spec(Path({str(smollm2)!r})).num_layers)"
    )
    assert (done.code, done.stdout) == (0, "30\n")
    assert done.peak_bytes < 40 << 20


def test_a_list_in_place_of_a_text_is_named_in_plain_words(tmp_path: Path) -> None:
    path = write_model(tmp_path / "bad.gguf", extra={"tokenizer.chat_template": ["a", "b"]})
    with pytest.raises(
        BadModelFile, match=r"chat_template is a list of 2 values; it must be a string"
    ):
        read_spec(path)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    whole = write_model(tmp_path / "whole.gguf", layers=3)
    tool = [sys.executable, "-c", _SPLITTER, str(whole), str(tmp_path / "model")]
    subprocess.run(tool, check=True, capture_output=True)
    return sorted(tmp_path.glob("model-*.gguf"))


_SPLITTER = """
import sys, gguf
reader = gguf.GGUFReader(sys.argv[1])
half = len(reader.tensors) // 2
for part, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
    writer = gguf.GGUFWriter(f"{sys.argv[2]}-{part + 1:05}-of-00002.gguf", "llama")
    for key, field in reader.fields.items():
        if part == 0 and not key.startswith("GGUF.") and key != "general.architecture":
            value = field.contents()
            kind = field.types[0]
            if kind == gguf.GGUFValueType.ARRAY:
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kind)
    writer.add_uint16("split.no", part)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", len(reader.tensors))
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
    writer.close()
"""


def test_a_split_model_counts_all_its_parts(split: list[Path]) -> None:
    spec = read_spec(split[0])
    assert spec.paths == tuple(split)
    assert spec.file_bytes == sum(part.stat().st_size for part in split)
    assert spec.weight_bytes == read_spec(split[0].with_name("whole.gguf")).weight_bytes


def test_a_split_model_runs_like_the_whole(split: list[Path]) -> None:
    from lowtide.models.gguf.model import GgufModel
    from lowtide.models.gguf.parameters import LoadOptions

    options = LoadOptions(context=256, batch_size=8, threads=1)
    results = []
    for path in (split[0], split[0].with_name("whole.gguf")):
        with GgufModel(read_spec(path), options) as model:
            results.append(model.forward([5, 6, 7]).tobytes())
    assert results[0] == results[1]


def test_a_later_part_names_the_first(split: list[Path]) -> None:
    shutil.copy(split[0], split[0].with_name("model-00002-of-00002.gguf"))
    with pytest.raises(BadModelFile, match="open the first part, model-00001-of-00002.gguf"):
        read_spec(split[1])


def test_a_missing_part_is_named(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(BadModelFile, match="model-00002-of-00002.gguf is missing"):
        read_spec(split[0])


def test_a_renamed_part_says_how_to_name_it(split: list[Path]) -> None:
    renamed = split[0].rename(split[0].with_name("mine.gguf"))
    with pytest.raises(BadModelFile, match="NAME-00001-of-00002.gguf"):
        read_spec(renamed)
