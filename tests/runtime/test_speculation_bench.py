"""The benchmark of answers on a small model: what it reports, not how fast that was."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.errors import BadOption
from lowtide.models.fake_model import CHAT_TEMPLATE
from lowtide.models.gguf.spec import read_spec
from lowtide.runtime.benchmark.attention import BenchFailed
from lowtide.runtime.benchmark.speculation import (
    OWN_PROMPTS,
    SpeculationBench,
    check_speculations,
    read_prompts,
)

OPTIONS = {
    "memory": 4 << 30,
    "context": 512,
    "kv_type": "f16",
    "threads": 1,
    "batch_size": 64,
    "attention": "dense",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    return write_model(path, quantised="Q4_0", width=128, chat_template=CHAT_TEMPLATE)


def test_every_kind_is_measured_against_the_plain_loop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    said: list[str] = []
    kinds = {"copies": ["tide tide tide tide", "sea sea sea sea"], "other": ["x"]}
    with SpeculationBench(read_spec(model), ("ngram", "auto:rows=4"), OPTIONS) as bench:
        cases = bench.run(kinds, rounds=2, tokens=6, progress=said.append)
        with pytest.raises(BenchFailed, match="raise --context"):
            bench.run({"long": ["x" * 500]}, rounds=1, tokens=100)
    told = [(case.kind, case.speculate, case.num_prompts) for case in cases]
    assert told == [
        ("copies", "ngram", 2), ("copies", "auto:rows=4", 2),
        ("other", "ngram", 1), ("other", "auto:rows=4", 1),
    ]  # fmt: skip
    for case in cases:
        values = case.to_dict()
        assert values["same"] and values["identical"] and values["attention"] == "dense"
        assert all(values[name] > 0 for name in values if name.endswith(("ratio", "per_s")))
        assert 0 <= values["accepted"] <= values["drafted"]
        assert (values["off_reason"] is None) == (values["drafted"] > 0)
        assert 20 << 20 < values["peak_rss_bytes"] < 1 << 30
    assert said == ["copies, 2 rounds", "other, 2 rounds"]


def test_a_side_that_cannot_open_says_why(model: Path) -> None:
    with pytest.raises(BenchFailed, match="needs at least"):
        SpeculationBench(read_spec(model), ("ngram",), {**OPTIONS, "memory": 30 << 20})


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [f'{{"category": "a", "turns": ["{n}", "later"]}}' for n in range(4)]
    path.write_text("\n".join([*lines, '{"category": "b", "turns": ["z"]}', ""]))
    assert read_prompts(path, 2) == {"a": ["0", "1"], "b": ["z"]}
    assert all(prompts for prompts in OWN_PROMPTS.values())


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"turns": ["a"]}', '{"category": "a", "turns": []}']
)
def test_files_without_prompts_are_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(BadOption, match="a JSON object a line is wanted"):
        read_prompts(path, 2)
    with pytest.raises(BadOption, match="can be read"):
        read_prompts(tmp_path / "none", 2)


def test_wrong_wishes() -> None:
    with pytest.raises(BadOption, match="what is measured against"):
        check_speculations(("ngram", "off"))
    with pytest.raises(BadOption, match="names a draft twice"):
        check_speculations(("ngram", "ngram"))
    with pytest.raises(BadOption, match="2 to 32 rows"):
        check_speculations(("ngram:rows=99",))
