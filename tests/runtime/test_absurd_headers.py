"""Models with absurd headers, each in a process of its own: inside the budget while planning, too, or refused.

`LOWTIDE_ABSURD=1000` opens 1,000 of them; `LOWTIDE_ABSURD_SEED` draws others.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from absurd_models import AbsurdModel
from gguf_files import write_model
from processes import run_lowtide, run_python

from lowtide.memory.units import MIB

pytestmark = pytest.mark.real

NUM_MODELS = int(os.environ.get("LOWTIDE_ABSURD", "20"))
SEED = int(os.environ.get("LOWTIDE_ABSURD_SEED", "3"))
MODELS = [
    AbsurdModel.drawn(numbers) for numbers in [random.Random(SEED)] for _ in range(NUM_MODELS)
]


@pytest.mark.parametrize("absurd", MODELS, ids=[str(i) for i in range(NUM_MODELS)])
def test_the_peak_is_inside_the_budget(absurd: AbsurdModel, tmp_path: Path) -> None:
    path, text = absurd.write(tmp_path / "model.gguf"), tmp_path / "text.txt"
    text.write_text("The sea is salty.")
    done = run_lowtide(*absurd.arguments(path, text), timeout=300)
    path.unlink()
    about = f"{absurd}\n{done.stderr[-2000:]}"
    assert done.peak_bytes <= absurd.budget_bytes, f"{done.peak_bytes / MIB:.1f} MiB, {about}"
    assert done.code in (0, 1, 2), about
    assert "Traceback" not in done.stderr, about
    assert done.code == 0 or "Error" in done.stderr or "Problem" in done.stdout, about
    # What is refused is refused before it is loaded.
    assert ", loaded, needs" not in done.stderr + done.stdout, about


@pytest.mark.parametrize("context", [1_000_000, 10_485_760, (1 << 31) - 1])
@pytest.mark.parametrize("mebibytes", [64, 100, 300])
def test_a_long_trained_context_is_shortened(tmp_path: Path, context: int, mebibytes: int) -> None:
    path = write_model(tmp_path / "model.gguf", context=context)
    done = run_lowtide(
        "run", str(path), "--raw", "--memory", f"{mebibytes}MiB", "-p", "Hi", "-n", "2"
    )
    assert done.code == 0, done.stderr
    assert "reduced to fit: context: " in done.stderr
    assert done.peak_bytes <= mebibytes * MIB


def test_a_refused_open_is_not_charged_to_later_ones(tmp_path: Path) -> None:
    """The vocabulary of the first model is laid out under its own budget, then its context is refused."""
    shape = {"vocabulary": 400_000, "width": 32, "heads": 1, "kv_heads": 1}
    large = write_model(tmp_path / "large.gguf", context=1_000_000, **shape)
    small = write_model(tmp_path / "small.gguf")
    program = f"""
from lowtide import OverBudget, Runtime
from lowtide.memory.process import _read
try:
    Runtime.open({str(large)!r}, memory="200MiB", context=1_000_000)
    raise SystemExit("opened")
except OverBudget as error:
    assert "before" not in str(error), error
first = _read().peak_bytes
with Runtime.open({str(small)!r}, memory="70MiB") as runtime:
    stats = runtime.generate("Hi", max_tokens=2).stats
    assert stats.peak_rss_bytes <= 70 << 20, stats.peak_rss_bytes
print(first)
"""
    done = run_python(program)
    assert done.code == 0, done.stderr
    assert int(done.stdout) > 70 * MIB  # so that the test can fail


HEADERS = {
    "texts": {f"own.text{i}": "y" * 1_000_000 for i in range(40)},
    "one text": {"own.text": "y" * 20_000_000},
    "a list of texts": {"own.texts": ["x" * 40] * 250_000},
    "a list of quotes": {"own.texts": ['"' * 40] * 100_000},
    "a list of long texts": {"own.texts": ["x" * 10_000] * 1000},
    "a list of numbers": {"own.numbers": [1_234_567_890] * 500_000},
    "a list of fractions": {"own.numbers": [0.5] * 500_000},
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_llama_cpp_makes_of_a_header_is_planned(tmp_path: Path, name: str) -> None:
    """It stores every text twice, and writes every list as text."""
    path = write_model(tmp_path / "model.gguf", context=512, extra=HEADERS[name])
    options = ("--raw", "-p", "Hi", "-n", "2", "-t", "1")
    stated = run_lowtide("plan", str(path), "--memory", "1MiB", "--json").stdout
    bound = int(json.loads(stated)["lower_bound_bytes"])
    below, within = (
        run_lowtide("run", str(path), "--memory", str(num_bytes), *options)
        for num_bytes in (bound * 3 // 4, bound)
    )
    assert below.code == 2 and below.peak_bytes <= bound * 3 // 4, below.stderr
    assert within.code == 0 and within.peak_bytes <= bound, within.stderr
