"""The benchmark's machinery on a small model: what it reports, not how fast that was."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_groups import reason_against_enforcing
from gguf_files import write_model

from lowtide.memory.os.cgroup import ControlGroup
from lowtide.memory.units import KilledByLimit
from lowtide.models.errors import BadOption
from lowtide.models.gguf.spec import read_spec
from lowtide.runtime.benchmark.attention import Bench, BenchFailed, check_attentions

OPTIONS = {"memory": 4 << 30, "context": 512, "kv_type": "f16", "threads": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "random.gguf", layers=4, width=128, heads=2, kv_heads=1)


def test_every_case_is_measured_against_the_peer(model: Path) -> None:
    said: list[str] = []
    attentions = ("dense", "tidal:k=100,layers=1")
    with Bench(read_spec(model), attentions, OPTIONS) as bench:
        cases = bench.run(300, rounds=2, tokens=4, progress=said.append)
    assert [case.attention for case in cases] == list(attentions)
    assert cases[1].policy == "tidal, k 100, selection layers 1 (user)"
    for case in cases:
        values = case.to_dict()
        assert values["depth"] == 300 and values["speculate"] is None
        assert (values["layers_native"], values["layers"]) == (4, 4)
        assert values["peer"].startswith("llama.cpp")
        assert 20 << 20 < values["peak_rss_bytes"] < 1 << 30
        assert all(values[name] > 0 for name in values if name.endswith(("ratio", "per_s")))
    assert len(said) == 2 * 2 * 3  # two rounds of prompts and of decoding, three processes


def test_packed_weights_are_measured_against_llamas_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_model(tmp_path / "quantised.gguf", quantised="Q4_0")
    options = {**OPTIONS, "repack": True}
    with Bench(read_spec(path), ("dense",), options) as bench:
        (case,) = bench.run(64, rounds=1, tokens=2)
    assert case.repacked_tensors == 2 * 7 + 1
    with pytest.raises(BenchFailed, match="none of the matrices"):
        Bench(read_spec(model), ("dense",), options)


def test_a_case_that_cannot_open_says_why(model: Path) -> None:
    with pytest.raises(BenchFailed, match="needs at least") as caught:
        Bench(read_spec(model), ("dense",), {**OPTIONS, "memory": 30 << 20})
    assert caught.value.exit_code == 2


GREEDY = "import sys; first = sys.stdin.readline(); block = bytearray(b'x') * (200 << 20)"


@pytest.mark.skipif(bool(reason_against_enforcing()), reason=reason_against_enforcing())
def test_a_case_that_passes_its_limit_is_killed_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ControlGroup] = []
    make = ControlGroup.make
    monkeypatch.setattr(
        ControlGroup, "make", lambda **named: made.append(make(**named)) or made[-1]
    )
    options = {**OPTIONS, "memory": 160 << 20}
    with Bench(read_spec(model), ("dense",), options, enforced=True) as bench:
        assert {group.limit_bytes for group in made} == {
            (160 << 20) + (160 << 20) // 64 + (4 << 20)
        }
        assert not any(group.num_kills for group in made)
        bench.run(100, rounds=1, tokens=2)
    monkeypatch.setattr("lowtide.runtime.benchmark.attention.STARTING", GREEDY)
    with pytest.raises(KilledByLimit, match="at its enforced limit of 166.5 MiB: raise --memory"):
        Bench(read_spec(model), ("dense",), options, enforced=True)
    assert len({group.folder for group in made[:2]}) == 2
    assert not any(group.folder.exists() for group in made)


def test_wrong_cases() -> None:
    with pytest.raises(BadOption, match="what is measured against"):
        check_attentions(("dense", "llama"))
    with pytest.raises(BadOption, match="names a policy twice"):
        check_attentions(("dense", "dense"))
