from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide.attention.bindings.library import guarded_aborts
from lowtide.models.errors import SnapshotError
from lowtide.models.fake_model import FakeModel
from lowtide.models.files.fingerprint import file_fingerprint
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.model import Model

OPTIONS = LoadOptions(context=256, batch_size=16, threads=1)
IDS = st.lists(st.integers(3, 319), min_size=1, max_size=16)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "random.gguf", width=128)


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_0"])
def models(file: Path, request: pytest.FixtureRequest) -> Iterator[tuple[GgufModel, GgufModel]]:
    options = replace(OPTIONS, kv_type=request.param)
    with GgufModel(read_spec(file), options) as one, GgufModel(read_spec(file), options) as other:
        yield one, other


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=IDS, before=st.lists(IDS, max_size=8), after=st.lists(IDS, min_size=1, max_size=3))
def test_loading_equals_never_having_stopped(
    models: tuple[GgufModel, GgufModel],
    tmp_path: Path,
    prompt: list[int],
    before: list[list[int]],
    after: list[list[int]],
) -> None:
    """Also where the other model held other tokens before."""
    original, restored = models
    for model in models:
        model.truncate(0)
    original.forward(prompt)
    num_bytes = original.save_kv(tmp_path / "state", prompt)
    with (tmp_path / "state").open("ab") as more:
        more.write(b"other data behind it")
    for token_ids in before:
        restored.forward(token_ids)
    assert restored.load_kv(tmp_path / "state", num_bytes, len(prompt)) == prompt
    assert restored.num_tokens == len(prompt)
    for token_ids in after:
        assert restored.forward(token_ids).tobytes() == original.forward(token_ids).tobytes()
    assert restored.truncate(1) == original.truncate(1)
    assert restored.forward([7]).tobytes() == original.forward([7]).tobytes()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(IDS, min_size=1, max_size=6),
    before=st.lists(IDS, max_size=8),
    remaining=st.integers(1, 96),
    after=st.lists(IDS, min_size=1, max_size=3),
)
def test_restoring_a_copy_equals_never_having_left(
    models: tuple[GgufModel, GgufModel],
    prompt: list[list[int]],
    before: list[list[int]],
    remaining: int,
    after: list[list[int]],
) -> None:
    """Also after truncating it, and in a model that computed other tokens meanwhile."""
    original, restored = models
    for model in models:
        model.truncate(0)
        for token_ids in prompt:
            model.forward(token_ids)
    num_tokens = restored.num_tokens
    state = memoryview(bytearray(restored.snapshot_bytes()))
    restored.copy_kv(state)
    restored.truncate(0)
    for token_ids in before:
        restored.forward(token_ids)
    restored.put_kv(state, num_tokens)
    assert restored.num_tokens == num_tokens
    assert restored.truncate(remaining) == original.truncate(remaining)
    for token_ids in after:
        assert restored.forward(token_ids).tobytes() == original.forward(token_ids).tobytes()


def test_a_copy_needs_a_buffer_of_its_size(file: Path) -> None:
    with GgufModel(read_spec(file), OPTIONS) as model:
        model.forward([5, 6, 7])
        state = memoryview(bytearray(model.snapshot_bytes()))
        for wrong in (state[:-1], memoryview(bytearray(10))):
            with pytest.raises(SnapshotError):
                model.copy_kv(wrong)
        model.copy_kv(state)
        for wrong, num_tokens in ((state, 2), (state[:-5], 3), (state[: len(state) // 2], 3)):
            with pytest.raises(SnapshotError):
                model.put_kv(wrong, num_tokens)
            assert model.num_tokens == 0
        model.put_kv(state, 3)
        assert model.num_tokens == 3


def test_what_a_snapshot_depends_on(file: Path, tmp_path: Path) -> None:
    """Not on the path of the file, but on its weights and the KV type."""
    spec = read_spec(file)
    with GgufModel(spec, OPTIONS) as model:
        properties = model.snapshot_properties()
    assert set(properties) == {"model", "KV type", "llama-cpp-python"}
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    with GgufModel(read_spec(copy), OPTIONS) as model:
        assert model.snapshot_properties() == properties
    with copy.open("r+b") as weights:
        weights.seek(-4000, 2)
        weights.write(b"\x3c" * 4000)
    with GgufModel(read_spec(copy), replace(OPTIONS, kv_type="q8_0")) as model:
        assert model.snapshot_properties()["model"] != properties["model"]
        assert model.snapshot_properties()["KV type"] == "q8_0"


def test_a_file_fingerprint_sees_every_part_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(8 << 20))
    seen = {file_fingerprint([path]), file_fingerprint([path, path])}
    for at in range(0, 8 << 20, 1 << 20):
        with path.open("r+b") as weights:
            weights.seek(at)
            weights.write(b"\xff" * (20 << 10))  # a small tensor
        seen.add(file_fingerprint([path]))
    assert len(seen) == 10


def test_other_bytes_are_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with GgufModel(read_spec(file), OPTIONS) as model:
        model.forward([5, 6, 7])
        num_bytes = model.save_kv(path, [5, 6, 7])
        state = path.read_bytes()
        wrong = {
            "empty": b"",
            "none": b"x" * 500,
            "cut": state[:-5],
            "half": state[: len(state) // 2],
            "tokens outside the vocabulary": state[:12] + b"\xff" * 4 + state[16:],
            "another length": state[:8] + b"\x02" + state[9:],
            "longer than it says": state,
        }
        for name, data in wrong.items():
            path.write_bytes(data)
            length = num_bytes + 1 if name == "longer than it says" else len(data)
            with pytest.raises(SnapshotError), guarded_aborts():
                model.load_kv(path, length, 3)
            assert model.num_tokens == 0, name
        path.write_bytes(state)
        assert model.load_kv(path, num_bytes, 3) == [5, 6, 7]


def test_a_wrong_header_is_refused_before_llama_cpp_reads(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    with GgufModel(read_spec(file), OPTIONS) as model:
        model.forward([5, 6, 7])
        num_bytes = model.save_kv(path, [5, 6, 7])
        state, read = path.read_bytes(), []
        load = model._api.llama_state_seq_load_file
        monkeypatch.setattr(
            model._api, "llama_state_seq_load_file", lambda *args: read.append(0) or load(*args)
        )

        def forged(at: int, number: int) -> bytes:
            return state[:at] + struct.pack("=i", number) + state[at + 4 :]

        cases = (
            (forged(8, 200), num_bytes, 3, "it holds 200 tokens instead of 3"),
            (forged(8, 2), num_bytes, 3, "it holds 2 tokens instead of 3"),
            (state, num_bytes, 4, "it holds 3 tokens instead of 4"),
            (forged(16, 320), num_bytes, 3, "not in the vocabulary"),
            (forged(12, -1), num_bytes, 3, "not in the vocabulary"),
            (state, 20, 3, "it ends before its 3 tokens do"),
        )
        for data, length, num_tokens, sentence in cases:
            path.write_bytes(data)
            with pytest.raises(SnapshotError, match=sentence):
                model.load_kv(path, length, num_tokens)
            assert model.num_tokens == 0 and not read
        for at in (0, 4):  # its magic, its version
            path.write_bytes(forged(at, 1))
            with pytest.raises(SnapshotError, match=r"unknown \(magic, version\)"):
                model.load_kv(path, num_bytes, 3)
        assert len(read) == 2


def test_a_snapshot_beyond_the_context_is_an_error(file: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "state", read_spec(file)
    with GgufModel(spec, replace(OPTIONS, context=1024)) as model:
        for _ in range(20):
            model.forward([5] * 16)
        num_bytes = model.save_kv(path, [5] * 320)
    with GgufModel(spec, OPTIONS) as model, pytest.raises(SnapshotError, match="token count"):
        model.load_kv(path, num_bytes, 320)


def test_an_incomplete_write_is_an_error(file: Path, tmp_path: Path) -> None:
    """The second limit only cuts the last bytes, which are written when the file is closed."""
    done = run_python(
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from lowtide.models.gguf.header.spec import read_spec\n"
        "from lowtide.models.gguf.model import GgufModel, LoadOptions\n"
        f"signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN)\n"
        "options = LoadOptions(context=256, batch_size=16, threads=1)\n"
        f"with GgufModel(read_spec(Path({str(file)!r})), options) as model:\n"
        "    for _ in range(6): model.forward([5] * 16)\n"
        f"    path = Path({str(tmp_path / 'state')!r})\n"
        "    whole = model.save_kv(path, [5] * 96)\n"
        "    for limit in (4096, whole - 1):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "        try:\n"
        "            model.save_kv(path, [5] * 96)\n"
        "        except Exception as error:\n"
        "            print(type(error).__name__, error)\n"
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("SnapshotError") and second.startswith("SnapshotError"), done.stderr


def test_a_fake_models_snapshot(tmp_path: Path) -> None:
    model, other = FakeModel(), FakeModel()
    model.forward([1, 2, 3])
    num_bytes = model.save_kv(tmp_path / "state", [1, 2, 3])
    assert other.load_kv(tmp_path / "state", num_bytes, 3) == [1, 2, 3]
    assert other.forward([4]).tobytes() == model.forward([4]).tobytes()
    for wrong_bytes, wrong_tokens in ((3, 3), (num_bytes, 2), (num_bytes - 4, 3)):
        with pytest.raises(SnapshotError):
            other.load_kv(tmp_path / "state", wrong_bytes, wrong_tokens)
        assert other.num_tokens == 0


def test_a_fake_models_copy() -> None:
    model, other = FakeModel(), FakeModel()
    model.forward([1, 2, 3])
    state = memoryview(bytearray(model.snapshot_bytes()))
    with pytest.raises(SnapshotError):
        model.copy_kv(state[:-1])
    model.copy_kv(state)
    other.put_kv(state, 3)
    assert other.forward([4]).tobytes() == model.forward([4]).tobytes()
    for wrong, num_tokens in ((state, 2), (state[:-1], 3)):
        with pytest.raises(SnapshotError):
            other.put_kv(wrong, num_tokens)
        assert other.num_tokens == 0


def test_a_model_that_cannot_copy_its_cache_says_so() -> None:
    class Bare(FakeModel):
        snapshot_bytes = Model.snapshot_bytes
        copy_kv = Model.copy_kv
        put_kv = Model.put_kv

    bare = Bare()
    for call in (
        bare.snapshot_bytes,
        lambda: bare.copy_kv(memoryview(b"")),
        lambda: bare.put_kv(memoryview(b""), 0),
    ):
        with pytest.raises(SnapshotError, match="fake cannot copy its KV cache"):
            call()
