"""--attention, evaluate, calibrate and bench on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model

from lowtide.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    path = write_model(
        folder / "random.gguf", layers=6, width=128, heads=2, kv_heads=1, context=4096
    )
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flash", "attention is 'flash'; it must be one of llama, dense, tidal, delta, gem"),
        ("tidal:k=0", "tidal's k is 0"),
        ("tidal:layers=99", "include layer 99; random has layers 0 to 5"),
        ("tidal:calibration=/nowhere.json", "/nowhere.json cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan", "evaluate", "bench"])
def test_a_wrong_policy_is_one_sentence(
    command: str, attention: str, message: str, model: str
) -> None:
    extra = ["-p", "x"] if command == "run" else []
    done = invoke(command, model, "--memory", "4GiB", "--attention", attention, *extra)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_statistics_describe_the_policy(model: str) -> None:
    done = invoke(
        "run", model, "--memory", "4GiB", "-c", "1024", "-p", "tide " * 100, "--raw", "-n", "4",
        "--attention", "tidal:k=100,layers=1", "--json",
    )  # fmt: skip
    assert done.exit_code == 0
    stats = json.loads(done.stdout)["stats"]
    assert stats["attention"] == "tidal, k 100, selection layers 1 (user)"
    assert 0.3 < stats["attended_share"] < 0.9
    assert stats["layers_native"] == stats["layers"] == 6


def test_the_share_of_attended_keys_is_printed(model: str) -> None:
    done = invoke(
        "run", model, "--memory", "4GiB", "-c", "1024", "-p", "tide " * 100, "--raw", "-n", "4",
        "--attention", "tidal:k=100",
    )  # fmt: skip
    assert "tidal, k 100, selection layers 2 (default layers: not calibrated" in done.stderr
    assert "of the KV cache" in done.stderr


def test_calibrate_then_use_it(model: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = invoke(
        "calibrate", model, "--memory", "4GiB", "-c", "1024", "--target-kl", "1",
        "--target-key-loss", "10", "--max-layers", "1", "--k", "128", "-o", str(path), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(path) and result["params"]["k"] == 128
    assert result["metrics"]["target_kl"] == 1
    assert json.loads(path.read_text())["params"] == result["params"]
    used = invoke(
        "run", model, "--memory", "4GiB", "-c", "512", "-p", "x", "--raw", "-n", "1",
        "--attention", f"tidal:calibration={path}", "--json",
    )  # fmt: skip
    assert "calibrated: KL" in json.loads(used.stdout)["stats"]["attention"]
    chosen = invoke(
        "calibrate", model, "--memory", "4GiB", "-c", "1024", "--target-kl", "1", "--k", "128",
        "--target-key-loss", "10", "--attention", "tidal:layers=1+3", "-o", str(path), "--json",
    )  # fmt: skip
    assert chosen.exit_code == 0, chosen.stderr
    assert json.loads(chosen.stdout)["params"]["selection_layers"] == [1, 3]
    other = write_model(tmp_path / "other.gguf", layers=6, width=64, heads=2, kv_heads=1)
    refused = invoke("plan", str(other), "--attention", f"tidal:calibration={path}")
    assert refused.exit_code == 2 and "belongs to another model: its fingerprint" in refused.stderr


def test_an_impossible_calibration_is_refused(model: str, tmp_path: Path) -> None:
    base = ("calibrate", model, "--memory", "4GiB", "--max-layers", "1", "--k", "128")
    short = invoke(*base, "-c", "512")
    assert short.exit_code == 2 and "it must be 1024 or more to calibrate" in short.stderr
    never = invoke(*base, "-c", "1024", "--target-kl", "0.0001")
    assert never.exit_code == 1 and "raise --target-kl" in never.stderr
    small = tmp_path / "small.txt"
    small.write_text("x")
    text = invoke(*base, "-c", "1024", "--text", str(small))
    assert text.exit_code == 2 and "use a longer --text" in text.stderr


def test_evaluate_for_programs_and_for_people(model: str) -> None:
    base = ("evaluate", model, "--memory", "4GiB", "-c", "512", "--windows", "2")
    base += ("--attention", "tidal:k=100,layers=1", "--no-passkeys")
    printed = json.loads(invoke(*base, "--json").stdout)
    assert {"version", "model", "machine", "attention", "context", "kl"} <= set(printed)
    assert printed["context"] == 512 and printed["passkeys"]["asked"] == 0
    shown = invoke(*base).stdout
    assert "KL, nats" in shown and f"{printed['kl']:.4f}" in shown


def test_bench_for_programs_and_for_people(model: str) -> None:
    base = ("bench", model, "--memory", "4GiB", "-d", "100", "--rounds", "1", "-n", "2")
    printed = json.loads(invoke(*base, "--attention", "dense", "--json").stdout)
    (case,) = printed["cases"]
    assert case["attention"] == "dense" and case["depth"] == 100 and case["peak_rss_bytes"] > 0
    shown = invoke(*base, "--attention", "dense", "--attention", "tidal:k=80,layers=1")
    lines = shown.stdout.splitlines()
    assert any(line.split()[:2] == ["100", "llama.cpp"] for line in lines)
    assert any(line.split()[:2] == ["100", "dense"] for line in lines)
    assert max(map(len, lines)) <= 110 or os.environ.get("COLUMNS")
    twice = invoke(*base, "--attention", "dense", "--attention", "dense")
    assert twice.exit_code == 2 and "names a policy twice" in twice.stderr
    deep = invoke("bench", model, "--memory", "4GiB", "-d", "5000")
    assert deep.exit_code == 2 and "was trained for 4096" in deep.stderr
