"""The paired benchmark on a small model: what it reports, not how fast that was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from control_groups import reason_against_enforcing
from gguf_files import write_model

from lowtide.memory.os.cgroup import ControlGroup
from lowtide.memory.units import KilledByLimit
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.benchmark.paired import BenchmarkCase, BenchmarkFailed, PairedBenchmark
from lowtide.runtime.benchmark.tasks import (
    BUILT_IN_PROMPTS,
    AnswerTask,
    DepthTask,
    attention_workers,
    read_prompts,
    speculation_workers,
)

OPTIONS = {"memory": 4 << 30, "context": 512, "kv_type": "f16", "threads": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "random.gguf", layers=4, width=128, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "random.gguf"
    return write_model(path, quantised="Q4_0", width=128, chat_template=CHAT_TEMPLATE)


def paired(
    path: Path, *attentions: str, enforced: bool = False, depth: int = 64, **options: object
) -> PairedBenchmark:
    spec = read_spec(path)
    workers = attention_workers(spec, attentions or ("dense",), {**OPTIONS, **options})
    return PairedBenchmark(spec, workers, [DepthTask(depth, tokens=4)], enforced=enforced)


def test_every_policy_is_compared_with_the_engine(model: Path) -> None:
    attentions = ("dense", "tidal:k=100,layers=1")
    notes: list[str] = []
    with paired(model, *attentions, depth=300) as benchmark:
        cases = benchmark.run(rounds=2, progress=notes.append)
    assert [case.attention for case in cases] == list(attentions)
    assert cases[1].policy == "tidal, k 100, selection layers 1 (user)"
    for case in cases:
        values = case.to_dict()
        assert values["depth"] == 300 and "speculate" not in values
        assert (values["layers_native"], values["layers"]) == (4, 4)
        assert values["peer"].startswith("llama.cpp (llama-cpp-python ")
        assert 20 << 20 < values["peak_rss_bytes"] < 1 << 30
        assert all(values[name] > 0 for name in values if name.endswith(("ratio", "per_s")))
    workers = "with llama.cpp, dense, tidal:k=100,layers=1"
    assert notes == [
        f"prefill of 300 tokens: 2 rounds {workers}",
        f"decode at 300 tokens: 2 rounds {workers}",
    ]


def test_every_draft_is_compared_with_no_speculation(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    spec = read_spec(chat_model)
    workers = speculation_workers("dense", ("ngram", "auto"), OPTIONS)
    tasks = [
        AnswerTask("copies", ("tide tide tide tide", "sea sea sea sea"), tokens=6),
        AnswerTask("other", ("x",), tokens=6),
    ]
    with PairedBenchmark(spec, workers, tasks) as benchmark:
        cases = benchmark.run(rounds=2)
    assert [(case.task.label, case.name) for case in cases] == [
        ("copies", "ngram"),
        ("copies", "auto"),
        ("other", "ngram"),
        ("other", "auto"),
    ]
    assert [case.to_dict()["num_prompts"] for case in cases] == [2, 2, 1, 1]
    for case in cases:
        values = case.to_dict()
        assert values["same"] and values["identical"] and values["attention"] == "dense"
        assert values["speculate"] == case.name and "prefill_ratio" not in values
        assert all(values[name] > 0 for name in values if name.endswith(("ratio", "per_s")))
        assert 0 <= values["accepted"] <= values["drafted"]
        assert (values["off_reason"] is None) == (values["drafted"] > 0)
        assert 20 << 20 < values["peak_rss_bytes"] < 1 << 30


def test_a_prompt_that_is_too_long_is_an_error(chat_model: Path) -> None:
    workers = speculation_workers("dense", ("ngram",), OPTIONS)
    tasks = [AnswerTask("long", ("x" * 500,), tokens=100)]
    with (
        PairedBenchmark(read_spec(chat_model), workers, tasks) as benchmark,
        pytest.raises(BenchmarkFailed, match="raise context"),
    ):
        benchmark.run(rounds=1)


def test_repacked_weights_are_compared_with_the_original_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_model(tmp_path / "quantised.gguf", quantised="Q4_0")
    with paired(path, repack=True) as benchmark:
        (case,) = benchmark.run(rounds=1)
    assert case.repacked_tensors == 2 * 7 + 1
    with pytest.raises(BenchmarkFailed, match="none of the matrices"):
        paired(model, repack=True)


def test_a_worker_that_cannot_load_reports_its_error(model: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="needs at least") as caught:
        paired(model, memory=30 << 20)
    assert caught.value.exit_code == 2


ALLOCATES_200_MIB = (
    "import sys; first = sys.stdin.readline(); block = bytearray(b'x') * (200 << 20)"
)


@pytest.mark.skipif(bool(reason_against_enforcing()), reason=reason_against_enforcing())
def test_the_kernel_kills_a_worker_over_its_limit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[ControlGroup] = []
    make = ControlGroup.make
    monkeypatch.setattr(
        ControlGroup, "make", lambda **named: groups.append(make(**named)) or groups[-1]
    )
    with paired(model, enforced=True, memory=160 << 20) as benchmark:
        limit = (160 << 20) + (160 << 20) // 64 + (4 << 20)
        assert {group.limit_bytes for group in groups} == {limit}
        assert not any(group.num_kills for group in groups)
        benchmark.run(rounds=1)
    monkeypatch.setattr("lowtide.runtime.benchmark.paired.WORKER_CODE", ALLOCATES_200_MIB)
    with pytest.raises(KilledByLimit, match="at the enforced limit of 166.5 MiB: raise memory"):
        paired(model, enforced=True, memory=160 << 20)
    assert len({group.folder for group in groups[:2]}) == 2
    assert not any(group.folder.exists() for group in groups)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [f'{{"category": "a", "turns": ["{n}", "later"]}}' for n in range(4)]
    path.write_text("\n".join([*lines, '{"category": "b", "turns": ["z"]}', ""]))
    assert read_prompts(path, 2) == {"a": ["0", "1"], "b": ["z"]}
    assert all(BUILT_IN_PROMPTS.values())


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"turns": ["a"]}', '{"category": "a", "turns": []}']
)
def test_files_without_prompts_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(BadOption, match="write one JSON object per line"):
        read_prompts(path, 2)
    with pytest.raises(BadOption, match="cannot read prompts"):
        read_prompts(tmp_path / "none", 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda spec: attention_workers(spec, ("dense", "llama"), OPTIONS), "is the baseline"),
        (lambda spec: attention_workers(spec, ("dense", "dense"), OPTIONS), "names a policy twice"),
        (lambda _: speculation_workers("dense", ("ngram", "off"), OPTIONS), "is the baseline"),
        (lambda _: speculation_workers("dense", ("ngram",) * 2, OPTIONS), "names a draft twice"),
        (lambda _: speculation_workers("dense", ("ngram:draft=99",), OPTIONS), "draft=99"),
    ],
)
def test_wrong_configurations(
    make: Callable[..., list[BenchmarkCase]], message: str, model: Path
) -> None:
    with pytest.raises(BadOption, match=message):
        make(read_spec(model))
