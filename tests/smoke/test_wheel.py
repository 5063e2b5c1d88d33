"""A user's first steps with the installed wheel: import, chat, run, plan, convert, ONNX, lowtide's kernels.

`tests/wheel_test.sh` runs them outside the checkout; LOWTIDE_CHECKOUT names the checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

COMMAND = """
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="lowtide")
command.load()()
"""
LIMITS = ("--memory", "1GiB", "-c", "512")


def lowtide(*arguments: str, stdin: str = "") -> str:
    """Run the `lowtide` command and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate(*arguments: str) -> dict[str, Any]:
    """Return what `lowtide run --json` prints for a greedy answer of 8 tokens."""
    prompt = ("-p", "Why is the sea salty?", "-n", "8", "--temp", "0", "--json")
    result: dict[str, Any] = json.loads(lowtide("run", *arguments, *prompt, *LIMITS))
    assert len(result["tokens"]) == 8 and result["text"]
    return result


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return generate()


def test_every_file_is_from_the_wheel() -> None:
    import lowtide.attention
    import lowtide.attention.bindings.library as native
    import lowtide.runtime

    site = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(os.environ["LOWTIDE_CHECKOUT"]).resolve() not in site.parents
    for path in (*lowtide.__path__, *lowtide.runtime.__path__, native.native_library()._name):
        assert site in Path(path).resolve().parents, f"{path} is not from the wheel"


def test_the_wheel_has_what_the_package_reads_and_no_sources() -> None:
    files = {str(path) for path in distribution("lowtide").files or ()}
    assert {"lowtide/py.typed", "lowtide/attention/lowtide_native.so"} <= files
    assert any(path.startswith("lowtide/attention/calibrations/") for path in files)
    assert not [path for path in files if path.startswith("lowtide/attention/native/")]
    assert not [path for path in files if path.split("/")[0] in ("tests", "docs", "memory")]


def test_public_names_can_be_imported() -> None:
    import lowtide

    assert [name for name in lowtide.__all__ if getattr(lowtide, name, None) is None] == []
    assert lowtide.__version__ == distribution("lowtide").version


def test_the_native_library_is_of_this_version() -> None:
    import lowtide
    from lowtide.attention.bindings.library import cpu_features, native_version

    assert native_version() == lowtide.__version__
    assert isinstance(cpu_features(), tuple)


def test_each_command_has_help() -> None:
    from lowtide.cli.main import COMMANDS

    text = lowtide("--help")
    assert all(f"  {command} " in text for command in COMMANDS)


def test_run(answer: dict[str, Any]) -> None:
    stats = answer["stats"]
    assert 0 < stats["peak_rss_bytes"] <= stats["planned_bytes"] <= stats["budget_bytes"]


def test_python() -> None:
    from lowtide import GenerationResult, Runtime

    with Runtime.open(memory="1GiB", context=512) as runtime:
        result = GenerationResult.of(
            runtime.chat([{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0)
        )
    assert result.text and result.stats.generated_tokens == 4


def test_chat_over_a_pipe() -> None:
    text = lowtide("chat", "--temp", "0", "-n", "6", *LIMITS, stdin="Hi\n/stats\nAnd now?\n/exit\n")
    assert len(text.strip().splitlines()) >= 2


def test_plan() -> None:
    plan = json.loads(lowtide("plan", "--memory", "300MiB", "--json"))
    assert plan["fits"] and plan["lower_bound_bytes"] < plan["budget_bytes"] == 300 << 20


def test_lowtides_kernels_compute_the_answer(answer: dict[str, Any]) -> None:
    native = generate("--attention", "dense", "--repack")
    assert native["stats"]["layers_native"] == native["stats"]["layers"] == 30
    assert native["stats"]["repacked_tensors"] > 0
    assert native["tokens"][0] == answer["tokens"][0]


@pytest.mark.parametrize("attention", ["tidal", "delta", "gem"])
def test_each_policy_runs_with_its_calibration(attention: str) -> None:
    assert generate("--attention", attention)["stats"]["attention"].startswith(attention)


def test_convert_and_run_onnx(tmp_path: Path, answer: dict[str, Any]) -> None:
    folder = tmp_path / "onnx"
    assert lowtide("convert", "smollm2", str(folder)) == f"{folder}\n"
    stock = generate(str(folder))
    native = generate(str(folder), "--attention", "dense", "--repack")
    assert stock["tokens"][0] == native["tokens"][0] == answer["tokens"][0]
    assert native["stats"]["layers_native"] == 30
