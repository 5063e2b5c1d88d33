"""calibrate for delta, as typed."""

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
    told = json.loads(done.stdout)
    assert told["policy"] == "delta" and told["path"] == str(path)
    assert 0.65 < told["sparsity"] <= 0.875
    assert told["kl"] <= 1 and told["keys_read"] < 0.8
    assert json.loads(path.read_text())["num_groups"] == told["num_groups"]
    attention = f"delta:calibration={path}"
    used = invoke(
        "run", model, "--attention", attention, "-c", "512", "-p", "Hi", "-n", "1", "--raw"
    )
    assert used.exit_code == 0, used.stderr
    assert "attention delta, sparsity" in used.stderr and "(calibrated: KL" in used.stderr


def test_targets_that_nothing_reaches_are_an_error(model: str, tmp_path: Path) -> None:
    targets = ("--target-kl", "0.0001", "--target-key-loss", "0.001")
    done = calibrate(model, tmp_path / "c.json", *targets)
    assert done.exit_code == 1 and not (tmp_path / "c.json").exists()
    assert "keeps random within a KL of 0.0001" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention", "delta:sparsity=0.5"), "delta's sparsity is given, and is what calibrate"),
        (("--attention", "delta:calibration=x"), "delta's calibration is given"),
        (("--attention", "delta", "--k", "512"), "--k is for tidal and gem"),
        (("--attention", "delta", "--max-layers", "3"), "--max-layers is for tidal"),
    ],
)
def test_what_is_searched_for_is_not_stated(
    arguments: tuple[str, ...], message: str, model: str
) -> None:
    done = invoke("calibrate", model, *arguments)
    assert done.exit_code == 2 and message in done.stderr
