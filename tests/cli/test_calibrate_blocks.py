"""`lowtide calibrate --attention delta:granularity=block`, and other commands with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model

from lowtide.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    path = write_model(
        folder / "random.gguf", layers=2, width=64, heads=2, kv_heads=1, context=2048
    )
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def calibrate(model: str, path: Path, attention: str, *arguments: str) -> Result:
    fixed = ("--attention", attention, "--memory", "2GiB", "-c", "1024", "-t", "1", "-o", str(path))
    return invoke("calibrate", model, *fixed, *arguments)


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        ("delta:granularity=block,block=8", "blocks of 8"),
        ("delta:granularity=element", "elements"),
    ],
)
def test_calibrate_then_use_it(attention: str, name: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = calibrate(model, path, attention, "--target-kl", "1", "--target-key-loss", "10")
    assert done.exit_code == 0, done.stderr
    assert "behind the window: KL" in done.stdout
    assert f"--attention {attention},calibration={path} uses it" in done.stdout
    saved = json.loads(path.read_text())
    sparsity = saved["metrics"]["sparsity"]
    assert sparsity >= 0.5 and len(saved["params"]["thresholds"]) == 2
    used = invoke(
        *("run", model, "--attention", f"{attention},calibration={path}", "-c", "512"),
        *("-p", "Hi " * 100, "-n", "2", "--raw", "--memory", "2GiB", "--json"),
    )
    assert used.exit_code == 0, used.stderr
    stats = json.loads(used.stdout)["stats"]
    assert stats["attention"].startswith(f"delta, {name}, sparsity {sparsity:.0%}, window 128")
    assert stats["scores"]["sparsity"] > 0.2
    assert stats["scores"]["skipped"] < stats["scores"]["sparsity"]


def test_the_share_of_skipped_multiplications_is_printed(model: str) -> None:
    done = invoke(
        *("run", model, "--attention", "delta:granularity=block,sparsity=50%", "-c", "512"),
        *("-p", "Hi " * 100, "-n", "2", "--raw", "--memory", "2GiB"),
    )
    assert done.exit_code == 0, done.stderr
    assert "delta, blocks of 8, sparsity 50%, window 128 (user)" in done.stderr
    assert "of score multiplications skipped" in done.stderr


def test_if_nothing_reaches_the_targets_there_is_no_file(model: str, tmp_path: Path) -> None:
    targets = ("--target-kl", "0.0001", "--target-key-loss", "0.0001")
    done = calibrate(model, tmp_path / "c.json", "delta:granularity=block", *targets)
    assert done.exit_code == 1 and not (tmp_path / "c.json").exists()
    assert "keeps random within a KL of 0.0001" in done.stderr


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("sparsity=0.5", "calibrate finds delta's sparsity: leave sparsity out"),
        ("calibration=x", "calibrate finds delta's calibration"),
    ],
)
def test_settings_that_calibrate_finds_are_refused(
    attention: str, message: str, model: str
) -> None:
    done = invoke("calibrate", model, "--attention", f"delta:granularity=block,{attention}")
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "evaluate", "bench"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("granularity=head", "granularity is 'head'; it must be token, block or element"),
        ("granularity=block,block=12", "block is 12; it must be 8 or 16 channels"),
        ("block=8", "block is 8 and its granularity is token"),
        ("granularity=element,window=-1", "delta's window is -1"),
        ("granularity=block,calibration=/nowhere.json", "/nowhere.json cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    command: str, settings: str, message: str, model: str
) -> None:
    extra = ["-p", "x"] if command == "run" else []
    done = invoke(command, model, "--memory", "4GiB", "--attention", f"delta:{settings}", *extra)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_plan_has_the_key_blocks(model: str) -> None:
    def scratch(attention: str) -> int:
        done = invoke("plan", model, "-c", "2048", "--attention", attention, "--json")
        rows = json.loads(done.stdout)["rows"]
        return next(row["bytes"] for row in rows if row["component"] == "attention scratch")

    dense, blocks = scratch("dense"), scratch("delta:granularity=block")
    keys = 2 * 2048 * 32 * 2  # of two layers with one head of 32 channels, in half precision
    assert blocks - dense >= keys


def test_evaluate_prints_the_share_of_skipped_multiplications(model: str) -> None:
    base = ("evaluate", model, "--memory", "4GiB", "-c", "512", "--windows", "1", "--no-passkeys")
    base += ("--attention", "delta:granularity=element,sparsity=80%")
    scores = json.loads(invoke(*base, "--json").stdout)["scores"]
    assert 0.78 <= scores["sparsity"] <= 0.8 and 0.3 < scores["skipped"] < 0.7
    assert scores["key_bytes_read"] < scores["key_bytes_total"]
    assert "score multiplications skipped (" in invoke(*base).stdout
