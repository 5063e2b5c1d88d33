from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf_files import write_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import BadModelFile, LowtideError, ModelNotFound, TemplateError
from lowtide.models.gguf.header.reader import MAX_LONG_TEXT_BYTES, read_gguf
from lowtide.models.gguf.header.spec import read_spec


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "small.gguf", layers=1, width=32)


def test_reads_what_the_gguf_package_wrote(small: Path) -> None:
    contents = read_gguf(small)
    assert contents.metadata["general.architecture"] == "llama"
    assert contents.metadata["llama.embedding_length"] == 32
    assert contents.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = contents.metadata["tokenizer.ggml.tokens"]
    assert tokens.length == 320 and tokens.text_bytes > 320
    names = {tensor.name: tensor for tensor in contents.tensors}
    assert names["blk.0.ffn_up.weight"].shape == (32, 128)
    assert names["blk.0.ffn_up.weight"].num_bytes == 4 * 32 * 128


def _with(data: bytes, at: int, replacement: bytes) -> bytes:
    return data[:at] + replacement + data[at + len(replacement) :]


BAD_FILES = {
    "empty": (lambda d: b"", "is empty"),
    "text": (lambda d: b"Dear diary, today I " * 20, "is not a GGUF file"),
    "only a magic": (lambda d: b"GGUF" + bytes(4), "truncated"),
    "header cut": (lambda d: d[:200], "GGUF"),
    "weights cut": (lambda d: d[:-1000], "is truncated: its tensors end at byte"),
    "version 1": (lambda d: _with(d, 4, struct.pack("<I", 1)), "version 1"),
    "big endian": (lambda d: _with(d, 4, struct.pack(">I", 3)), "big-endian machines"),
    "absurd keys": (
        lambda d: _with(d, 16, struct.pack("<Q", 1 << 60)),
        "claims 1152921504606846976",
    ),
    "absurd tensors": (lambda d: _with(d, 8, struct.pack("<Q", 1 << 40)), "claims 1099511627776"),
    "absurd text": (lambda d: _with(d, 24, struct.pack("<Q", 1 << 62)), "claims a text of"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(name: str, small: Path, tmp_path: Path) -> None:
    change, expected = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(small.read_bytes()))
    with pytest.raises(BadModelFile) as caught:
        read_spec(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file at"):
        read_spec(tmp_path / "nothing.gguf")
    with pytest.raises(BadModelFile, match="is a folder"):
        read_spec(tmp_path)


def test_no_memory_is_allocated_by_a_count_in_the_file(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "absurd.gguf"
    data = small.read_bytes()
    tracemalloc.start()
    try:
        for at in (8, 16, 24, 36):
            for number in (1 << 62, 1 << 33, len(data) // 24):
                path.write_bytes(_with(data, at, struct.pack("<Q", number)))
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                with pytest.raises(LowtideError):
                    read_spec(path)
                # A tensor directory of garbage is refused at its first entry.
                assert tracemalloc.get_traced_memory()[1] - before < 2 << 20
    finally:
        tracemalloc.stop()


LONG_HEADERS = {
    "texts": {f"own.text{i}": "y" * 1_000_000 for i in range(20)},
    "texts of the model": {f"llama.text{i}": "y" * 1_000_000 for i in range(20)},
    "many keys": {f"own.key{i}": "z" for i in range(20_000)},
    "a list of texts": {"own.texts": ["x" * 40] * 250_000},
    "a chat template": {"tokenizer.chat_template": "{{ m }}" * 600_000},
}


@pytest.mark.parametrize("name", LONG_HEADERS)
def test_what_no_plan_needs_is_not_read_into_memory(name: str, tmp_path: Path) -> None:
    """A header is read before a plan is made, so the peak counts, mapped pages of the file included."""
    path = write_model(tmp_path / "long.gguf", extra=LONG_HEADERS[name])
    program = f"""
from pathlib import Path
from lowtide.memory.process import read_process_memory
from lowtide.models.gguf.header.spec import read_spec
read_spec(Path({str(write_model(tmp_path / "small.gguf"))!r}))
before = read_process_memory().peak_bytes
spec = read_spec(Path({str(path)!r}))
print(read_process_memory().peak_bytes - before, len(spec.chat_template or ""))
"""
    done = run_python(program)
    assert done.code == 0, done.stderr
    grown_bytes, template_length = map(int, done.stdout.split())
    assert path.stat().st_size > 800_000
    assert grown_bytes < 1 << 20
    assert template_length == (MAX_LONG_TEXT_BYTES if name == "a chat template" else 0)


def test_a_template_that_was_cut_is_refused_as_too_long() -> None:
    shortest = "\N{GRINNING FACE}" * (MAX_LONG_TEXT_BYTES // 4)
    assert len(shortest.encode()) == MAX_LONG_TEXT_BYTES
    with pytest.raises(TemplateError, match="more than 65,536 characters"):
        ChatTemplate(shortest, {})


def test_names_that_no_model_has_are_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.gguf"
    data = small.read_bytes()
    name = b"token_embd.weight"
    at = data.index(struct.pack("<Q", len(name)) + name)
    path.write_bytes(_with(data, at, struct.pack("<Q", 256)))
    with pytest.raises(BadModelFile, match="the name of a tensor has 256 bytes"):
        read_gguf(path)


HEADER_BYTES = 8000


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, HEADER_BYTES), st.binary(min_size=1, max_size=9)),
        min_size=1,
        max_size=6,
    ),
    cut=st.none() | st.integers(0, HEADER_BYTES),
)
@example(edits=[(36, b"\xff" * 8)], cut=None)
def test_fuzzed_headers_are_read_or_refused(
    edits: list[tuple[int, bytes]], cut: int | None, small: Path, tmp_path: Path
) -> None:
    data = bytearray(small.read_bytes())
    for at, replacement in edits:
        data[at : at + len(replacement)] = replacement
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(data[:cut])
    try:
        spec = read_spec(path)
    except LowtideError as error:
        assert len(str(error)) < 4000
    else:
        assert 0 < spec.num_layers <= 4096
        assert spec.weight_bytes <= spec.file_bytes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 1 << 31),
        ("embedding_length", 0),
        ("context_length", 0),
        ("attention.head_count", 1 << 30),
    ],
)
def test_impossible_numbers_name_their_key(key: str, value: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "odd.gguf", overrides={key: value})
    with pytest.raises(BadModelFile, match=f"llama.{key}"):
        read_spec(path)
