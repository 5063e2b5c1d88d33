"""Budgets below the model's size, and KV caches that do not fit whole, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_lowtide, run_python
from requantised import requantised

from lowtide.attention.bindings.library import can_map_lazily
from lowtide.memory.units import MIB

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not can_map_lazily(), reason="mappings are populated at once on this system"
    ),
]
QUESTION = ("-p", "Why is the sea salty?", "-n", "8", "--temp", "0", "--json")


def test_a_model_of_twice_the_budget_answers_the_same(smollm2: Path, tmp_path: Path) -> None:
    model = str(requantised(smollm2, tmp_path / "f16.gguf", "F16"))
    assert Path(model).stat().st_size > 2 * 130 * MIB * 0.95
    ample = run_lowtide("run", model, "-c", "8192", *QUESTION)
    tight = run_lowtide("run", model, "-c", "8192", "--memory", "130MiB", *QUESTION)
    assert (ample.code, tight.code) == (0, 0), tight.stderr
    assert json.loads(tight.stdout)["tokens"] == json.loads(ample.stdout)["tokens"]
    assert tight.peak_bytes <= 130 * MIB < ample.peak_bytes
    plan = json.loads(
        run_lowtide("plan", model, "-c", "8192", "--memory", "130MiB", "--json").stdout
    )
    assert plan["fits"] and plan["context"] == 8192 and plan["kv_type"] == "f16"
    assert plan["resident_layers"] is not None and plan["kv_tokens"] < 8192


def test_the_default_model_runs_in_100_mib() -> None:
    plan = json.loads(run_lowtide("plan", "--memory", "100MiB", "--json").stdout)
    assert plan["fits"] and plan["lower_bound_bytes"] < 100 * MIB
    done = run_lowtide("run", "--memory", "100MiB", *QUESTION)
    assert done.code == 0, done.stderr
    assert done.peak_bytes <= 100 * MIB


FULL = """
import json
from lowtide import GenerationResult, OverBudget, PromptTooLong, Runtime
with Runtime.open("smollm2", memory=BUDGET, context=4096, kv_type="f16", threads=1) as runtime:
    room = runtime._engine.kv_reservation.most_tokens(4096)
    count = len(runtime._model.tokenizer.encode("tide " * 100, add_special=True, parse_special=False))
    words = (room - 12) * 100 // count
    result = runtime.generate("tide " * words, max_tokens=None, temperature=0)
    try:
        runtime.generate("tide " * 3000, max_tokens=4)
        refused = None
    except PromptTooLong as error:
        refused = str(error)
    again = runtime.generate("Once upon a time", max_tokens=4, temperature=0)
    print(json.dumps([
        room, result.finish_reason, len(runtime._session.token_ids), result.stats.prompt_tokens,
        len(result.token_ids), refused, again.finish_reason, runtime.plan.kv_tokens,
    ]))
"""


def test_an_answer_ends_where_the_cache_is_full_and_the_runtime_stays_usable() -> None:
    plan = json.loads(
        run_lowtide(
            *("plan", "smollm2", "-c", "4096", "--kv-type", "f16", "--memory", "1GiB", "--json")
        ).stdout
    )
    budget = plan["lower_bound_bytes"] + 2 * MIB
    done = run_python(FULL.replace("BUDGET", str(budget)))
    assert done.code == 0, done.stderr
    room, reason, _, prompt_tokens, generated, refused, then, planned = json.loads(done.stdout)
    assert 512 <= planned <= room < 4096
    assert (reason, then) == ("memory", "length")
    assert abs(prompt_tokens + generated - room) <= 1 and generated >= 1
    assert refused is not None and f"the context holds {room:,}" in refused
    assert done.peak_bytes <= budget
