"""calibrate for gem, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf_files import write_model

from lowtide.attention.gem import calibrate as gem_calibrate
from lowtide.cli.main import main

pytestmark = pytest.mark.once


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
    """A third of the questions, for models that take their time."""
    monkeypatch.setattr(gem_calibrate, "DEPTHS", (0.5,))


@pytest.mark.usefixtures("one_depth")
def test_calibrate_the_default_model_then_use_it(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    done = invoke(
        "calibrate", "--attention", "gem:layer=17", "--memory", "2GiB", "-c", "1600", "-t", "1", "-o",
        str(path), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["path"] == str(path) and (told["k"], told["layer"]) == (400, 17)
    assert told["num_asked"] == 6 == told["num_kept"] and told["margin"] > 0
    assert told["num_answered"] == told["num_dense_answered"] > 2
    assert json.loads(path.read_text())["margin"] == told["margin"]
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
    assert "no layer of random keeps every hidden sentence with k 512" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention", "dense"), "attention is 'dense': tidal, with its layers"),
        (("--attention", "tidal:k=100"), "attention is 'tidal:k=100': tidal, with its layers"),
        (("--attention", "tidal:layers=9"), "name layer 9; random has layers 0 to 2"),
        (("--attention", "gem:layer=3"), "gem's layer is 3; random has layers 0 to 2"),
        (("--attention", "gem:k=10%"), "gem's k is 0.1: say once, as a number of tokens"),
        (("--attention", "gem:k=100", "--k", "100"), "k is 100 and --k is given: say once"),
        (("--attention", "gem", "--target-kl", "0.1"), "--target-kl is for tidal"),
        (("--attention", "gem:calibration=x.json"), "is what calibrate makes: leave it out"),
        (("--attention", "gem", "-c", "512"), "1024 or more tokens"),
        (("--attention", "gem", "--k", "300"), "k is 300 and the context 1024: 1200 or more"),
        (("--attention", "gem", "--text", "/nowhere.txt"), "/nowhere.txt cannot be read"),
    ],
)
def test_calibrate_with_what_cannot_be(
    arguments: tuple[str, ...], message: str, model: str
) -> None:
    context = () if "-c" in arguments else ("-c", "1024")
    done = invoke("calibrate", model, "--memory", "4GiB", *context, *arguments)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and message in lines[0] and done.stdout == ""
