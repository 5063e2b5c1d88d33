"""`lowtide profile`, as typed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from processes import Finished, run_lowtide, run_measured

from lowtide.memory.units import MIB

Invoke = Callable[..., Result]
KEYS = {
    *("version", "model", "machine", "plan", "measured", "resident_bytes", "peak_rss_bytes"),
    *("seconds", "phases", "layers", "retention_map", "turns", "buffers"),
}
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def test_json_is_one_documented_object(lowtide: Invoke) -> None:
    done = lowtide("profile", "-p", "Hi", "--json")
    values = json.loads(done.stdout)
    assert done.exit_code == 0 and set(values) == KEYS
    planned = [row["component"] for row in values["plan"]["rows"]]
    assert [row["component"] for row in values["measured"]] == [*planned, "other"]
    assert sum(row["bytes"] or 0 for row in values["measured"]) == values["resident_bytes"]
    assert {"name", "seconds", "calls"} == set(values["phases"][0])
    assert values["turns"][0]["generated_tokens"] == 6
    assert "reused" in done.stderr


def test_tables(lowtide: Invoke) -> None:
    printed = lowtide("profile", "-p", "Hi").stdout
    for word in ("Component", "Measured", "KV cache", "other", "Phase", "decode pass", "peak"):
        assert word in printed


def test_a_script_is_a_chat(lowtide: Invoke, tmp_path: Path) -> None:
    script = tmp_path / "turns.txt"
    script.write_text("Hi\n\nAnd then?\n")
    done = lowtide("profile", "--script", str(script), "--json", replies=("One.", "Two."))
    first, second = json.loads(done.stdout)["turns"]
    assert (first["reused_tokens"], first["generated_tokens"]) == (0, 4)
    assert second["reused_tokens"] > first["prompt_tokens"]


def test_a_prompt_through_a_pipe(lowtide: Invoke) -> None:
    done = lowtide("profile", "--json", input="Hi")
    assert json.loads(done.stdout)["turns"][0]["prompt_tokens"] == 22


WRONG: dict[str, tuple[list[str], str]] = {
    "two sources": (
        ["-p", "x", "--script", "pyproject.toml"],
        "--prompt and --script exclude each other",
    ),
    "no such script": (["--script", "nothing.txt"], "cannot read nothing.txt: No such file"),
    "no folder": (
        ["-p", "x", "--trace", "/nowhere/t.json"],
        "cannot write /nowhere/t.json, because the folder /nowhere does not exist: create it",
    ),
    "a folder": (["-p", "x", "--trace", "/"], "is a directory"),
    "bad count": (["-p", "x", "-n", "0"], "--max-tokens is 0"),
    "too long": (["-p", "y" * 600], "the context holds 512"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_sentence_and_exit_code_2(name: str, lowtide: Invoke) -> None:
    arguments, expected = WRONG[name]
    done = lowtide("profile", *arguments)
    assert done.exit_code == 2
    assert expected in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\n  \n", "has no turns"), (b"x" * 2_000_000, "is longer than"), (b"\xff", "not UTF-8")],
)
def test_invalid_scripts(content: bytes, expected: str, lowtide: Invoke, tmp_path: Path) -> None:
    script = tmp_path / "turns.txt"
    script.write_bytes(content)
    done = lowtide("profile", "--script", str(script))
    assert done.exit_code == 2 and expected in done.stderr


@pytest.mark.parametrize("option", ["--report", "--png"])
def test_without_matplotlib_no_model_is_loaded(
    option: str, lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    done = lowtide("profile", "-p", "x", option, str(tmp_path / "out"))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {option} needs matplotlib")
    assert "pip install 'lowtide[report]'" in done.stderr and done.stderr.count("\n") == 1
    assert lowtide.models == []  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the real model once and write all kinds of files."""
    folder = tmp_path_factory.mktemp("profile")
    arguments = ["--trace", str(folder / "t.json")]
    if importlib.util.find_spec("matplotlib") is not None:
        arguments += ["--report", str(folder / "r.html"), "--png", str(folder / "p.png")]
    done = run_lowtide(
        "profile", "smollm2", "--memory", "400MiB", "-c", "2048", "--attention", "dense",
        "-p", "Why is the sea salty? " * 20, "-n", "20", "--temp", "0", "--json", *arguments,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return {"json": json.loads(done.stdout), "folder": folder, "stderr": done.stderr}


@pytest.mark.real
def test_the_trace_has_the_trace_event_format(outputs: dict[str, Any]) -> None:
    trace = json.loads((outputs["folder"] / "t.json").read_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    for event in events:
        assert isinstance(event["name"], str) and event["pid"] == 1 and event["tid"] in (1, 2)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
        if event["ph"] == "C":
            assert event["ts"] >= 0
            assert all(isinstance(value, int) for value in event["args"].values())
    values = outputs["json"]
    decoded = [event for event in events if event["name"] == "decode pass"]
    assert len(decoded) == next(p["calls"] for p in values["phases"] if p["name"] == "decode pass")
    layers = [event for event in events if event["name"] == "layer 29"]
    assert layers and all(event["args"]["attention_us"] > 0 for event in layers)
    resident = [event for event in events if event["name"] == "resident bytes"]
    assert max(sum(event["args"].values()) for event in resident) == values["resident_bytes"]


@pytest.mark.real
@needs_matplotlib
def test_the_page_refers_to_no_other_file(outputs: dict[str, Any]) -> None:
    page = (outputs["folder"] / "r.html").read_text()
    assert page.count("<svg") == 4
    references = re.findall(r"""(?:href|src|data|action)\s*=\s*["']?([^"'\s>]+)""", page)
    assert references and all(reference.startswith("#") for reference in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", page))
    for word in ("<script", "<link", "<iframe", "@import", "<!DOCTYPE svg"):
        assert word not in page
    identifiers = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.real
@needs_matplotlib
def test_the_page_has_the_numbers_of_the_json(outputs: dict[str, Any]) -> None:
    page, values = (outputs["folder"] / "r.html").read_text(), outputs["json"]
    for row in values["measured"]:
        value = "-" if row["bytes"] is None else f"{row['bytes'] / MIB:,.2f}"
        assert re.search(
            rf"<td>{row['component']}</td><td[^>]*>[^<]*</td><td class=n>{value}</td>", page
        )
    for row in values["plan"]["rows"]:
        assert f"<td>{row['component']}</td><td class=n>{row['bytes'] / MIB:,.2f}</td>" in page
    for phase in values["phases"]:
        cells = f"<td class=n>{phase['seconds']:.6f}</td><td class=n>{phase['calls']:,}</td>"
        assert f"<td>{phase['name']}</td>{cells}" in page
    for layer in values["layers"]:
        assert f"<td>{layer['name']}</td><td class=n>{1000 * layer['prefill_pass_s']:.4f}" in page


@pytest.mark.real
@needs_matplotlib
def test_the_image_is_a_large_png(outputs: dict[str, Any]) -> None:
    data = (outputs["folder"] / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > 1000 and height > 1000


@pytest.mark.real
@needs_matplotlib
def test_drawing_is_not_in_the_measured_peak(outputs: dict[str, Any]) -> None:
    """matplotlib needs tens of megabytes, which would count as other."""
    values = outputs["json"]
    rows = {row["component"]: row["bytes"] for row in values["measured"]}
    assert rows["other"] < 8 * MIB
    assert values["peak_rss_bytes"] <= values["plan"]["total_bytes"]


OWN_PEAK = """
import atexit, resource, sys
def print_peak():
    print("own peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
atexit.register(print_peak)
from lowtide.cli.main import main
main()
"""


def reported_bound(stderr: str) -> int:
    """Return the budget that an error recommends, in MiB."""
    return int(re.findall(r"raise --memory to (\d+)MiB", stderr)[0])


@needs_matplotlib
def test_drawing_is_outside_of_the_budget_at_the_lower_bound(tmp_path: Path) -> None:
    """Measures the process itself, without the drawing process that it starts.

    40 MiB are refused by the formulas. With the budget that they recommend, the process is measured.
    """
    page, png = tmp_path / "r.html", tmp_path / "p.png"

    def profiled(megabytes: int) -> Finished:
        return run_measured(
            sys.executable, "-c", OWN_PEAK, "profile", "--memory", f"{megabytes}MiB", "-p", "Hi",
            "-n", "16", "-t", "1", "--report", str(page), "--png", str(png),
        )  # fmt: skip

    bound = reported_bound(profiled(40).stderr) + 1
    done = profiled(bound)
    if done.code == 2:
        bound = reported_bound(done.stderr) + 1
        done = profiled(bound)
    assert done.code == 0, done.stderr
    assert page.stat().st_size > 10_000 and png.stat().st_size > 10_000
    peaks = re.findall(r"own peak (\d+)", done.stderr)
    assert int(peaks[0]) <= bound * MIB


@needs_matplotlib
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('there is no font')", "there is no font"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os; os._exit(3)", "no reason"),
    ],
)
def test_a_failed_drawing_is_one_sentence_after_the_numbers(
    code: str, reason: str, lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.runtime.profiling.export.DRAWER_CODE", code)
    png = tmp_path / "p.png"
    done = lowtide("profile", "-p", "Hi", "--json", "--png", str(png))
    assert done.exit_code == 1 and set(json.loads(done.stdout)) == KEYS
    assert done.stderr.splitlines()[-1] == (
        f"Error: cannot draw the image of the profile ({reason}): leave it out, --json has the same numbers"
    )
    assert not png.exists()


@needs_matplotlib
def test_an_odd_model_name_is_escaped(
    lowtide: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from lowtide.models import fake_model

    plain = fake_model.fake_spec
    odd = "<b>$\\frac{1}$ 海 &"
    monkeypatch.setattr(
        fake_model, "fake_spec", lambda context: dataclasses.replace(plain(context), name=odd)
    )
    page, png = tmp_path / "r.html", tmp_path / "p.png"
    done = lowtide("profile", "-p", "Hi", "--report", str(page), "--png", str(png))
    assert done.exit_code == 0 and png.stat().st_size > 10_000
    assert "<b>" not in page.read_text() and "&lt;b&gt;$" in page.read_text()
