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
from lowtide.models.fingerprint import file_fingerprint
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.gguf.spec import read_spec
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


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kept=IDS, before=st.lists(IDS, max_size=8), after=st.lists(IDS, min_size=1, max_size=3))
def test_loading_equals_never_having_left(
    models: tuple[GgufModel, GgufModel],
    tmp_path: Path,
    kept: list[int],
    before: list[list[int]],
    after: list[list[int]],
) -> None:
    """Whatever the other model held before."""
    stayed, came_back = models
    for model in models:
        model.truncate(0)
    stayed.forward(kept)
    num_bytes = stayed.save_kv(tmp_path / "state", kept)
    with (tmp_path / "state").open("ab") as more:
        more.write(b"what stands behind it")
    for token_ids in before:
        came_back.forward(token_ids)
    assert came_back.load_kv(tmp_path / "state", num_bytes, len(kept)) == kept
    assert came_back.num_tokens == len(kept)
    for token_ids in after:
        assert came_back.forward(token_ids).tobytes() == stayed.forward(token_ids).tobytes()
    assert came_back.truncate(1) == stayed.truncate(1)
    assert came_back.forward([7]).tobytes() == stayed.forward([7]).tobytes()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kept=st.lists(IDS, min_size=1, max_size=6),
    before=st.lists(IDS, max_size=8),
    cut=st.integers(1, 96),
    after=st.lists(IDS, min_size=1, max_size=3),
)
def test_putting_back_a_copy_equals_never_having_left(
    models: tuple[GgufModel, GgufModel],
    kept: list[list[int]],
    before: list[list[int]],
    cut: int,
    after: list[list[int]],
) -> None:
    """Also after a cut into it, and in the very model that was read on meanwhile."""
    stayed, came_back = models
    for model in models:
        model.truncate(0)
        for token_ids in kept:
            model.forward(token_ids)
    num_tokens = came_back.num_tokens
    state = memoryview(bytearray(came_back.state_bytes()))
    came_back.copy_kv(state)
    came_back.truncate(0)
    for token_ids in before:
        came_back.forward(token_ids)
    came_back.put_kv(state, num_tokens)
    assert came_back.num_tokens == num_tokens
    assert came_back.truncate(cut) == stayed.truncate(cut)
    for token_ids in after:
        assert came_back.forward(token_ids).tobytes() == stayed.forward(token_ids).tobytes()


def test_a_copy_needs_its_bytes_and_comes_back_whole(file: Path) -> None:
    with GgufModel(read_spec(file), OPTIONS) as model:
        model.forward([5, 6, 7])
        state = memoryview(bytearray(model.state_bytes()))
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


def test_whose_a_state_is(file: Path, tmp_path: Path) -> None:
    """The same file at another place is the same; other weights of the same shape, or types, are not."""
    spec = read_spec(file)
    with GgufModel(spec, OPTIONS) as model:
        component = model.snapshot_component()
    assert set(component) == {"model", "KV type", "llama-cpp-python"}
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    with GgufModel(read_spec(copy), OPTIONS) as model:
        assert model.snapshot_component() == component
    with copy.open("r+b") as weights:
        weights.seek(-4000, 2)
        weights.write(b"\x3c" * 4000)
    with GgufModel(read_spec(copy), replace(OPTIONS, kv_type="q8_0")) as model:
        assert model.snapshot_component()["model"] != component["model"]
        assert model.snapshot_component()["KV type"] == "q8_0"


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


def test_bytes_that_are_no_state_of_this_model_are_an_error(file: Path, tmp_path: Path) -> None:
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
            "tokens that the vocabulary has not": state[:12] + b"\xff" * 4 + state[16:],
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


def test_a_header_that_says_otherwise_is_refused_before_llama_cpp_reads(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    with GgufModel(read_spec(file), OPTIONS) as model:
        model.forward([5, 6, 7])
        num_bytes = model.save_kv(path, [5, 6, 7])
        state, read = path.read_bytes(), []
        load = model._api.llama_state_seq_load_file
        monkeypatch.setattr(
            model._api, "llama_state_seq_load_file", lambda *given: read.append(0) or load(*given)
        )

        def forged(at: int, number: int) -> bytes:
            return state[:at] + struct.pack("=i", number) + state[at + 4 :]

        cases = (
            (forged(8, 200), num_bytes, 3, "it holds 200 tokens, 3 are wanted"),
            (forged(8, 2), num_bytes, 3, "it holds 2 tokens, 3 are wanted"),
            (state, num_bytes, 4, "it holds 3 tokens, 4 are wanted"),
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


def test_a_longer_state_than_the_context_is_an_error(file: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "state", read_spec(file)
    with GgufModel(spec, replace(OPTIONS, context=1024)) as model:
        for _ in range(20):
            model.forward([5] * 16)
        num_bytes = model.save_kv(path, [5] * 320)
    with GgufModel(spec, OPTIONS) as model, pytest.raises(SnapshotError, match="token count"):
        model.load_kv(path, num_bytes, 320)


def test_a_write_that_the_system_cuts_short_is_an_error(file: Path, tmp_path: Path) -> None:
    """The second limit lets everything through but the last bytes, which go out when the file is closed."""
    done = run_python(
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from lowtide.models.gguf.spec import read_spec\n"
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


def test_a_fake_models_state(tmp_path: Path) -> None:
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
    state = memoryview(bytearray(model.state_bytes()))
    with pytest.raises(SnapshotError):
        model.copy_kv(state[:-1])
    model.copy_kv(state)
    other.put_kv(state, 3)
    assert other.forward([4]).tobytes() == model.forward([4]).tobytes()
    for wrong, num_tokens in ((state, 2), (state[:-1], 3)):
        with pytest.raises(SnapshotError):
            other.put_kv(wrong, num_tokens)
        assert other.num_tokens == 0


def test_a_model_that_copies_nothing_says_so() -> None:
    class Bare(FakeModel):
        state_bytes = Model.state_bytes
        copy_kv = Model.copy_kv
        put_kv = Model.put_kv

    bare = Bare()
    for call in (
        bare.state_bytes,
        lambda: bare.copy_kv(memoryview(b"")),
        lambda: bare.put_kv(memoryview(b""), 0),
    ):
        with pytest.raises(SnapshotError, match="fake cannot copy its KV cache"):
            call()
