"""Weights that are repacked in memory give the logits of the copy, in the memory that is planned."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from processes import run_python
from requantised import requantised

from lowtide import Runtime
from lowtide.memory.units import MIB
from lowtide.models.errors import ModelError
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels import copies, repack_in_memory
from lowtide.runtime.backends.kernels.copies import read_copies
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

Usage = namedtuple("Usage", "total used free")
PROMPT = tuple(range(5, 75))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _path: Usage(1 << 40, 1 << 40, 0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(
        folder / "F32.gguf", width=256, heads=4, kv_heads=2, feed_forward=512, context=512
    )


def _logits(path: Path, *, trim: bool = False) -> tuple[np.ndarray, Engine]:
    engine = Engine(plan_reference(path, LoadConfig(repack=True, memory="2GiB", threads=2)))
    try:
        engine.model.forward(PROMPT[:32])
        if trim:
            engine.trim("complete")
        rows = [engine.model.forward(some).copy() for some in (PROMPT[32:], (9,))]
        return np.stack(rows), engine
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q6_K", "F16"])
def test_the_logits_are_those_of_the_copy(
    name: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = requantised(source, tmp_path / f"{name}.gguf", name)
    before = path.read_bytes()
    request.getfixturevalue("full_disk")
    found, engine = _logits(path)
    assert engine.planned.spec.paths == (path,) and engine.planned.spec.repacked_tensors
    assert engine.not_repacked_reason is None and read_copies() == []
    assert path.read_bytes() == before, "the file stays as it is"
    request.getfixturevalue("monkeypatch").undo()
    request.getfixturevalue("monkeypatch").setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    expected, engine = _logits(path)
    assert engine.planned.spec.paths != (path,)
    assert np.array_equal(found, expected)


def test_trimming_does_not_lose_the_tiles(source: Path, tmp_path: Path, full_disk: None) -> None:
    path = requantised(source, tmp_path / "m.gguf", "Q4_0")
    assert np.array_equal(_logits(path)[0], _logits(path, trim=True)[0])


def test_the_plan_says_where_the_weights_lie(tmp_path: Path, full_disk: None) -> None:
    path = write_model(tmp_path / "m.gguf", quantised="Q4_0")
    planned = plan_reference(path, LoadConfig(repack=True, memory="2GiB"))
    (why,) = (row.why for row in planned.plan.rows if row.component == "weights")
    assert "repacked for lowtide in memory, because" in why and "make room" in why
    other = plan_reference(path, LoadConfig(memory="2GiB"))
    assert "in memory, because" not in str(other.plan)


def test_a_model_without_such_matrices_says_so(tmp_path: Path, full_disk: None) -> None:
    with Runtime.open(write_model(tmp_path / "m.gguf"), memory="1GiB", repack=True) as runtime:
        stats = runtime.generate("a", max_tokens=2).stats
    assert "none of the matrices" in str(stats.not_repacked_reason)


def test_weights_that_are_not_mapped_are_an_error(
    tmp_path: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repack_in_memory, "address_in", lambda *_: None)
    path = write_model(tmp_path / "m.gguf", quantised="Q4_0")
    with pytest.raises(ModelError, match="is not mapped"):
        Runtime.open(path, memory="1GiB", repack=True)


PROGRAM = """
import json, sys
from collections import namedtuple
from lowtide import Runtime
from lowtide.runtime.backends.kernels import copies
Usage = namedtuple("Usage", "total used free")
copies.shutil.disk_usage = lambda _path: Usage(1 << 40, 1 << 40, 0)
with Runtime.open("smollm2", repack=True, attention="dense", memory=sys.argv[1], context=1024) as runtime:
    result = runtime.generate("The sea is", max_tokens=16, temperature=0)
    streamed = runtime.plan.resident_layers
    print(json.dumps([runtime.plan.total_bytes, result.stats.repacked_tensors,
                      result.stats.not_repacked_reason, streamed, list(result.token_ids)]))
"""


@pytest.mark.real
def test_the_process_stays_inside_the_plan(smollm2: Path) -> None:
    def run(memory: str) -> tuple[list, int]:  # type: ignore[type-arg]
        code = PROGRAM.replace("sys.argv[1]", repr(memory))
        done = run_python(code)
        assert done.code == 0, done.stderr
        return json.loads(done.stdout), done.peak_bytes

    (planned, repacked, reason, streamed, tokens), peak = run("1GiB")
    assert repacked == 211 and reason is None and streamed is None
    assert peak <= planned
    copy = run_python(
        PROGRAM.replace("sys.argv[1]", "'1GiB'").replace("1 << 40, 0)", "0, 1 << 40)")
    )
    assert json.loads(copy.stdout)[-1] == tokens
    small = f"{(planned - read_spec(smollm2).file_bytes // 2) // MIB}MiB"
    # The copy of the run before is found: a budget below the weights streams it.
    (_, repacked, reason, streamed, _), peak = run(small)
    assert streamed is not None and repacked == 211 and peak <= int(small[:-3]) * MIB
    for found in read_copies():
        copies.delete_copies([found])
    (_, repacked, reason, streamed, _), peak = run(small)
    assert repacked == 0 and "streamed" in reason and streamed is not None
    assert peak <= int(small[:-3]) * MIB
