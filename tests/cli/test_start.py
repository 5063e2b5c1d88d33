"""What a start imports, and how often it reads the model's header."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.facts.store import SETTLED_S

NEVER = {
    "onnx",
    "onnxruntime",
    "tokenizers",
    "llguidance",
    "huggingface_hub",
    "psutil",
    "numpy.ma",
    "rich",
}
"""What no run of a GGUF model needs."""
ONNX = "lowtide.models.onnx.spec"

PROGRAM = """
import atexit, json, os, sys
model, report = os.environ["MODEL"], os.environ["REPORT"]
opened = []
def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith(model):
        opened.append(str(arguments[0]))
sys.addaudithook(audit)
def write():
    modules = sorted(sys.modules)
    with open(report, "w") as file:
        json.dump({"modules": modules, "opened": opened}, file)
atexit.register(write)
from lowtide.cli.main import run
run()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(
        tmp_path / "start.gguf", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )


def _start(model: Path, *arguments: str) -> tuple[set[str], int]:
    """Run `lowtide`; return the modules that it imported, and how often Python opened the model's file."""
    report = model.with_name("report.json")
    environment = {
        **os.environ,
        "MODEL": model.name,
        "REPORT": str(report),
        "XDG_CACHE_HOME": str(model.parent / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    return set(found["modules"]), len(found["opened"])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["chat", "--help"]]
)
def test_help_imports_no_library_but_click(model: Path, arguments: list[str]) -> None:
    modules, num_opened = _start(model, *arguments)
    assert not modules & {
        *NEVER,
        "numpy",
        "jinja2",
        "ctypes",
        "lowtide.runtime.runtime",
        "lowtide.models.gguf.header.spec",
    }
    assert num_opened == 0


def test_a_run_imports_what_it_needs(model: Path) -> None:
    raw, _ = _start(model, "run", str(model), "-p", "hi", "-n", "1", "--raw", "--memory", "2GiB")
    assert not raw & {*NEVER, "jinja2", ONNX}
    assert {"numpy", "lowtide.runtime.runtime"} <= raw
    chat, _ = _start(model, "run", str(model), "-p", "hi", "-n", "1", "--memory", "2GiB")
    assert not chat & {*NEVER, ONNX}
    assert "jinja2" in chat
    planned, _ = _start(model, "plan", str(model), "--memory", "2GiB")
    assert not planned & {*NEVER, ONNX}


def test_the_header_is_read_once(model: Path) -> None:
    run = ("run", str(model), "-p", "hi", "-n", "1", "--raw", "--memory", "2GiB")
    time.sleep(SETTLED_S + 0.5)  # a file that just changed is not trusted
    _, first = _start(model, *run)
    assert first == 2, "the keys and the tensors, and the norm for the fingerprint"
    _, second = _start(model, *run)
    _, planned = _start(model, "plan", str(model), "--memory", "2GiB")
    assert (second, planned) == (0, 0)
    model.touch()
    _, again = _start(model, *run)
    assert again == 2
