"""`lowtide calibrate --attention delta`, of whole tokens."""

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


def calibrate(model: str, path: Path, *arguments: str) -> Result:
    fixed = ("--attention", "delta", "--memory", "2GiB", "-c", "1024", "-t", "1", "-o", str(path))
    return invoke("calibrate", model, *fixed, *arguments)


def test_calibrate_then_use_it(model: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = calibrate(model, path, "--target-kl", "1", "--target-key-loss", "10", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["policy"] == "delta-token" and result["path"] == str(path)
    metrics = result["metrics"]
    assert 0.65 < metrics["sparsity"] <= 0.875
    assert metrics["kl"] <= 1 and metrics["keys_read"] < 0.8
    assert json.loads(path.read_text())["params"] == result["params"]
    attention = f"delta:calibration={path}"
    used = invoke(
        "run", model, "--attention", attention, "-c", "512", "-p", "Hi", "-n", "1", "--raw"
    )
    assert used.exit_code == 0, used.stderr
    assert "attention delta, sparsity" in used.stderr and "(calibrated: KL" in used.stderr


def test_if_nothing_reaches_the_targets_there_is_no_file(model: str, tmp_path: Path) -> None:
    targets = ("--target-kl", "0.0001", "--target-key-loss", "0.001")
    done = calibrate(model, tmp_path / "c.json", *targets)
    assert done.exit_code == 1 and not (tmp_path / "c.json").exists()
    assert "keeps random within a KL of 0.0001" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--attention", "delta:sparsity=0.5"),
            "calibrate finds delta's sparsity: leave sparsity out",
        ),
        (("--attention", "delta:calibration=x"), "calibrate finds delta's calibration"),
        (("--attention", "delta", "--k", "512"), "delta is calibrated without --k: leave it out"),
        (("--attention", "delta", "--max-layers", "3"), "delta is calibrated without --max-layers"),
    ],
)
def test_settings_that_calibrate_finds_are_refused(
    arguments: tuple[str, ...], message: str, model: str
) -> None:
    done = invoke("calibrate", model, *arguments)
    assert done.exit_code == 2 and message in done.stderr
