"""`lowtide evaluate` with gem, as typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model

from lowtide.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    path = write_model(
        folder / "random.gguf", layers=3, width=64, heads=2, kv_heads=1, context=4096
    )
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_evaluate_as_json_and_as_a_table(model: str) -> None:
    base: tuple[str, ...] = (
        "evaluate",
        model,
        "-t",
        "1",
        "--memory",
        "4GiB",
        "-c",
        "3000",
        "--windows",
        "2",
    )
    base += ("--attention", "gem:k=100,layer=1")
    values = json.loads(invoke(*base, "--json").stdout)
    assert {"version", "model", "machine", "attention", "context", "nll_change"} <= set(values)
    assert values["questions"]["asked"] == 18 and values["hard_questions"]["asked"] == 24
    kinds = {case["kind"] for case in values["hard_questions"]["cases"]}
    assert kinds == {"paraphrase", "two questions", "counting", "question first"}
    printed = invoke(*base)
    assert "hard: counting" in printed.stdout and "in 1,500 tokens" in printed.stdout
    assert f"({values['nll_change']:+.1%})" in printed.stdout
    without = json.loads(invoke(*base, "--json", "--no-passkeys").stdout)
    assert without["questions"]["asked"] == 0 and without["tokens"] == 128


def test_prompts_that_are_not_filtered_are_refused(model: str) -> None:
    done = invoke("evaluate", model, "--memory", "4GiB", "-c", "2048", "--attention", "gem:layer=1")
    assert done.exit_code == 2 and "prompts of half of it are not filtered" in done.stderr
