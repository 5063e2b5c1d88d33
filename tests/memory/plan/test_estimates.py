"""The formulas compared with measurements: the plan is never below the peak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import write_model
from processes import run_python

from lowtide.memory.units import MIB

pytestmark = pytest.mark.real

_RUN = """
import json, sys
from lowtide import Runtime
from lowtide.memory.os import kv_pages
kv_pages._patch = lambda: None  # plan the whole KV cache, and make it resident
options = {options!r}
with Runtime.open(**options) as runtime:
    # The whole cache is resident from the start; a prompt of a few batches touches everything else.
    text = " word" * min(runtime.plan.context - 8, 3 * runtime.plan.batch_size)
    result = runtime.generate(text, max_tokens=4, overflow="drop-oldest")
    print(json.dumps([runtime.plan.total_bytes, result.stats.peak_rss_bytes]))
"""


def _planned_and_peak(**options: object) -> tuple[int, int]:
    done = run_python(_RUN.replace("{options!r}", repr(options)))
    assert done.code == 0, done.stderr
    planned, reported_peak = json.loads(done.stdout.splitlines()[-1])
    assert abs(reported_peak - done.peak_bytes) < 2 * MIB
    return planned, done.peak_bytes


CASES = [
    {"model": "smollm2", "context": 512},
    {"model": "smollm2", "context": 2048, "kv_type": "q8_0"},
    {"model": "smollm2", "context": 4096, "kv_type": "q4_0", "batch_size": 256},
    {"model": "smollm2", "context": 8192, "batch_size": 32},
    {"model": "gemma3-270m", "context": 512, "batch_size": 32},
    {"model": "gemma3-270m", "context": 2048},
    {"model": "gemma3-270m", "context": 4096, "kv_type": "q8_0"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_the_peak_is_below_the_plan(options: dict[str, object]) -> None:
    planned, peak = _planned_and_peak(**options, memory="2GiB")
    assert peak <= planned
    assert planned - peak < 64 * MIB  # and the plan is close


SHAPES = [
    {
        "layers": 6,
        "width": 512,
        "heads": 8,
        "kv_heads": 8,
        "feed_forward": 2048,
        "vocabulary": 32000,
    },
    {
        "layers": 3,
        "width": 768,
        "heads": 12,
        "kv_heads": 1,
        "feed_forward": 512,
        "vocabulary": 1000,
    },
    {
        "layers": 24,
        "width": 256,
        "heads": 4,
        "kv_heads": 4,
        "feed_forward": 256,
        "vocabulary": 100000,
    },
]


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "one-kv-head", "large-vocabulary"])
def test_the_peak_of_other_shapes_is_below_the_plan(shape: dict[str, int], tmp_path: Path) -> None:
    path = write_model(tmp_path / "shape.gguf", **shape, context=4096)
    planned, peak = _planned_and_peak(model=str(path), context=4096, memory="4GiB")
    assert peak <= planned


def test_process_memory_grows_by_an_allocation() -> None:
    """In a process of its own: a used heap may have free room for the allocation."""
    done = run_python(
        "from lowtide.memory.process import read_process_memory as read\n"
        "before = read(); block = bytearray(b'x') * (48 << 20); after = read(); del block; later = read()\n"
        "print(after.resident_bytes - before.resident_bytes, later.peak_bytes - before.resident_bytes)\n"
        "print(after.anonymous_bytes + after.file_bytes - after.resident_bytes)"
    )
    grown, peak, rest = map(int, done.stdout.split())
    assert abs(grown - (48 << 20)) < MIB
    assert peak >= 47 << 20
    assert abs(rest) < MIB
