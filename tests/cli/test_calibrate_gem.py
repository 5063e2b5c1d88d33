"""`lowtide calibrate --attention gem`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model

from lowtide.attention.evaluation import questions
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


@pytest.fixture
def one_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a third of the questions, because real models are slow."""
    monkeypatch.setattr(questions, "DEPTHS", (0.5,))


@pytest.mark.real
@pytest.mark.usefixtures("one_depth")
def test_calibrate_the_default_model_then_use_it(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = invoke(
        "calibrate", "--attention", "gem:layer=17", "--memory", "2GiB", "-c", "1600", "-t", "1", "-o",
        str(path), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    params, metrics = result["params"], result["metrics"]
    assert result["path"] == str(path) and (params["k"], params["layer"]) == (400, 17)
    assert metrics["num_asked"] == 6 == metrics["num_kept"] and metrics["margin"] > 0
    assert metrics["num_answered"] == metrics["num_dense_answered"] > 2
    assert json.loads(path.read_text())["metrics"] == metrics
    attention = f"gem:calibration={path}"
    used = invoke("run", "--attention", attention, "-c", "512", "-p", "Hi", "-n", "1")
    assert used.exit_code == 0 and "gem, k 400, layer 17 (calibrated:" in used.stderr


def test_a_model_of_random_weights_is_not_calibrated(model: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = invoke(
        "calibrate",
        model,
        "--attention",
        "gem",
        "--memory",
        "4GiB",
        "-c",
        "3000",
        "-t",
        "1",
        "-o",
        str(path),
    )
    assert done.exit_code == 1 and not path.exists()
    assert "no layer of random retains every hidden sentence with k 512" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention", "dense"), "attention is 'dense', which has nothing to calibrate"),
        (("--attention", "tidal:k=100"), "leave all of them out but layers"),
        (("--attention", "tidal:layers=9"), "include layer 9; random has layers 0 to 2"),
        (("--attention", "gem:layer=3"), "gem's layer is 3; random has layers 0 to 2"),
        (("--attention", "gem:k=10%"), "gem's k is 0.1: state it once, as a number of tokens"),
        (("--attention", "gem:k=100", "--k", "100"), "k is 100 and --k is given: state it once"),
        (
            ("--attention", "gem", "--target-kl", "0.1"),
            "gem is calibrated without --target-kl: leave it out",
        ),
        (("--attention", "gem:calibration=x.json"), "leave gem's calibration out"),
        (("--attention", "gem", "-c", "512"), "it must be 1024 or more to calibrate"),
        (
            ("--attention", "gem", "--k", "300"),
            "k is 300 and the context is 1024; it must be 1200 or more",
        ),
        (("--attention", "gem", "--text", "/nowhere.txt"), "cannot read /nowhere.txt"),
    ],
)
def test_an_impossible_calibration_is_one_sentence(
    arguments: tuple[str, ...], message: str, model: str
) -> None:
    context = () if "-c" in arguments else ("-c", "1024")
    done = invoke("calibrate", model, "--memory", "4GiB", *context, *arguments)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and message in lines[0] and done.stdout == ""
