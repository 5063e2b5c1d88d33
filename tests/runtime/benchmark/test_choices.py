"""`lowtide doctor MODEL` times kernels and threads, inside the budget and in a bounded time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf_files import write_model

from lowtide.cli.main import main
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.benchmark import choices
from lowtide.runtime.benchmark.choices import time_choices

KERNELS = ["llama.cpp", "dense", "dense, repacked"]


@pytest.fixture(autouse=True)
def _two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "usable_cores", lambda: 2)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return read_spec(write_model(tmp_path / "model.gguf", quantised="Q4_0"))


def test_each_choice_is_timed_once(spec: ModelSpec) -> None:
    timed = time_choices(spec, "2GiB")
    assert [(c.kernels, c.threads) for c in timed] == [(k, n) for n in (2, 1) for k in KERNELS]
    for choice in timed:
        assert choice.reason is None
        assert choice.prompt_tokens_per_s and choice.prompt_tokens_per_s > 0
        assert choice.decode_tokens_per_s and choice.decode_tokens_per_s > 0


def test_a_choice_beyond_the_budget_says_so(spec: ModelSpec) -> None:
    for choice in time_choices(spec, "8MiB"):
        assert choice.decode_tokens_per_s is None and "raise" in str(choice.reason)


def test_no_choice_begins_after_the_time(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "ENOUGH_S", 0.0)
    assert {choice.reason for choice in time_choices(spec, "2GiB")} == {
        "not measured, because the others took 0 s"
    }


def test_a_large_model_is_not_copied_for_the_comparison(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MOST_COPIED_BYTES", 0)
    repacked = [c for c in time_choices(spec, "2GiB") if c.kernels == KERNELS[2]]
    assert all("lowtide models repack" in str(choice.reason) for choice in repacked)
    assert not list(tmp_path.rglob("repacked/*.gguf"))


def test_a_model_that_cannot_be_repacked_says_why(tmp_path: Path) -> None:
    timed = time_choices(read_spec(write_model(tmp_path / "plain.gguf")), "2GiB")
    reasons = [choice.reason for choice in timed if choice.kernels == KERNELS[2]]
    assert all("none of the matrices" in str(reason) for reason in reasons)


def test_a_context_shorter_than_the_prompt_is_enough(tmp_path: Path) -> None:
    spec = read_spec(write_model(tmp_path / "short.gguf", quantised="Q4_0", context=8))
    assert all(choice.reason is None for choice in time_choices(spec, "2GiB"))


@pytest.mark.parametrize(("context", "is_timed"), [(1, False), (2, True)])
def test_a_context_of_a_single_token_says_why_it_is_not_timed(
    tmp_path: Path, context: int, is_timed: bool
) -> None:
    spec = read_spec(write_model(tmp_path / "short.gguf", context=context))
    for choice in time_choices(spec, "2GiB")[:2]:
        assert (choice.decode_tokens_per_s is not None) == is_timed, choice
        assert is_timed or "has no room" in str(choice.reason)


def test_doctor_shows_the_table(spec: ModelSpec) -> None:
    shown = CliRunner().invoke(main, ["doctor", str(spec.path), "--memory", "2GiB"]).stdout
    assert "decode, tokens/s" in shown
    assert [line.split("  ")[0] for line in shown.splitlines() if " 2 " in line[:30]] == KERNELS
    found = json.loads(
        CliRunner().invoke(main, ["doctor", str(spec.path), "--memory", "2GiB", "--json"]).stdout
    )
    assert len(found["choices"]) == 6 and found["choices"][0]["decode_tokens_per_s"] > 0


def test_a_missing_model_is_one_problem(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", str(tmp_path / "none.gguf"), "--json"])
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["problems"]) == 1
