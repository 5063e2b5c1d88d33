"""--speculate, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model
from processes import run_lowtide

from lowtide.cli.main import main
from lowtide.models.fake_model import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    return str(write_model(path, quantised="Q4_0", chat_template=CHAT_TEMPLATE))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("command", ["run", "plan", "profile"])
@pytest.mark.parametrize(
    ("speculate", "message"),
    [
        (
            "ngram:draft=0",
            "speculate is 'ngram:draft=0'; draft must be between 1 and 31 tokens",
        ),
        ("nothing-like-it", "nothing-like-it"),
    ],
)
def test_a_wrong_draft_is_one_error_sentence(
    command: str, speculate: str, message: str, model: str
) -> None:
    extra = ["-t", "1", "-p", "x"] if command != "plan" else []
    done = invoke(command, model, "--memory", "4GiB", "--speculate", speculate, *extra)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_plan_has_a_line_for_speculation(model: str) -> None:
    done = invoke("plan", model, "--memory", "4GiB", "--speculate", "auto:draft=3", "--json")
    plan = json.loads(done.stdout)
    rows = {row["component"]: row for row in plan["rows"]}
    assert 2 <= plan["verify_batch"] <= 4 and rows["speculation"]["bytes"] > 90_000
    drafted = invoke("plan", model, "--memory", "4GiB", "--speculate", model, "--json")
    components = [row["component"] for row in json.loads(drafted.stdout)["rows"]]
    assert {"speculation", "draft weights", "draft KV cache", "draft compute"} <= set(components)
    without = json.loads(invoke("plan", model, "--memory", "4GiB", "--json").stdout)
    assert without["verify_batch"] == 0


def test_an_answer_reports_accepted_drafts(model: str) -> None:
    line = [
        "run",
        model,
        "--memory",
        "4GiB",
        "--raw",
        "-p",
        "tide tide",
        "-n",
        "40",
        "--temp",
        "0",
        "-t",
        "1",
    ]
    plain = json.loads(invoke(*line, "--json").stdout)
    drafted = json.loads(invoke(*line, "--speculate", "auto", "--json").stdout)
    assert plain["stats"]["speculation"] is None
    speculation = drafted["stats"]["speculation"]
    assert speculation["identical"] and speculation["drafts"] == ["ngram", "trigram"]
    assert drafted["tokens"] == plain["tokens"]
    assert (speculation["rounds"] == 0) == (speculation["off_reason"] is not None)
    printed = invoke(*line, "--speculate", "ngram").stderr
    assert "draft tokens accepted" in printed or "no speculation: " in printed


def test_a_budget_without_room_turns_it_off_and_says_so(model: str) -> None:
    options = (model, "-c", "512", "-t", "1", "--speculate", "auto", "--reference")
    bound = json.loads(invoke("plan", *options, "--memory", "4GiB", "--json").stdout)
    tight = ("plan", *options, "--memory", str(bound["lower_bound_bytes"]))
    plan = json.loads(invoke(*tight, "--json").stdout)
    assert plan["verify_batch"] == 0 and plan["speculation"]["chosen"] is None
    assert plan["downgrades"][0].startswith("speculation: ")
    assert "the budget leaves no room for it" in invoke(*tight).stdout


def test_run_needs_what_plan_says(model: str) -> None:
    """Each measures itself, after other imports, and with another budget."""
    options = (model, "-c", "512", "-t", "1", "--speculate", "auto")
    planned = json.loads(run_lowtide("plan", *options, "--memory", "4GiB", "--json").stdout)
    budget = int(planned["lower_bound_bytes"])
    done = run_lowtide("run", *options, "--memory", str(budget), "-p", "x", "-n", "2")
    assert done.code == 0, done.stderr
    assert "no speculation: " in done.stderr
    assert done.peak_bytes <= budget


def test_the_plan_shows_the_choices_and_which_is_taken(model: str) -> None:
    command = ("plan", model, "--memory", "4GiB", "--attention", "dense", "--speculate", "auto")
    speculation = json.loads(invoke(*command, "--json").stdout)["speculation"]
    drafts = {choice["draft"] for choice in speculation["choices"]}
    assert drafts == {"ngram", "trigram", "auto"}
    assert {choice["draft_tokens"] for choice in speculation["choices"]} == set(range(1, 8))
    assert speculation["chosen"] in speculation["choices"]
    assert speculation["lower_bound_bytes"] <= speculation["chosen"]["bytes"]
    printed = invoke(*command).stdout
    assert printed.count("<- chosen") == 1 and "Costs of passes: assumed" in printed
    off = json.loads(invoke("plan", model, "--memory", "4GiB", "--json").stdout)
    assert off["speculation"] is None


def test_profile_and_chat_have_the_option_too(model: str, tmp_path: Path) -> None:
    script = tmp_path / "turns"
    script.write_text("tide\nagain\n")
    options = ("--memory", "4GiB", "-n", "3", "-t", "1", "--speculate", "auto")
    profiled = invoke("profile", model, *options, "-p", "tide", "--json")
    rows = {row["component"] for row in json.loads(profiled.stdout)["plan"]["rows"]}
    assert "speculation" in rows
    chat = CliRunner().invoke(main, ["chat", model, *options], input="tide\n/exit\n")
    assert chat.exit_code == 0, chat.stderr


def test_bench_measures_answers_by_kind(model: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"category": "copies", "turns": ["tide tide tide tide"]}\n')
    base = ("bench", model, "--memory", "4GiB", "-t", "1", "--rounds", "1", "-n", "4")
    base += ("--speculate", "ngram")
    (case,) = json.loads(invoke(*base, "--prompts", str(prompts), "--json").stdout)["cases"]
    assert (case["kind"], case["speculate"], case["attention"]) == ("copies", "ngram", "dense")
    assert case["decode_ratio"] > 0 and case["same"] and case["identical"]
    printed = invoke(*base, "--prompts", str(prompts)).stdout
    assert "yes" in printed and "off is the baseline" in printed
    deep = invoke(*base, "-d", "100")
    assert deep.exit_code == 2 and "answers fill the KV cache by themselves" in deep.stderr
    two = invoke(*base, "--attention", "dense", "--attention", "llama")
    assert two.exit_code == 2 and "name one" in two.stderr
    alone = invoke("bench", model, "--prompts", str(prompts))
    assert alone.exit_code == 2 and "--prompts needs --speculate" in alone.stderr
