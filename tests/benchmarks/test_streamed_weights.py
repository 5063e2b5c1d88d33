"""Streamed weights compared with resident weights: the same model, decoded in turn.

An F16 copy of the default model, planned for 130 MiB with a context of 8,192, compared with the same model
with all weights resident. The file is in the page cache, at first in small folios. Run with `make bench`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from paired import paired
from requantised import requantised

from lowtide.memory.units import GIB
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.benchmark
NUM_DECODED = 16
PAGE_BYTES = 4096


def loaded_for(path: Path, memory: str) -> Engine:
    """Load the model as planned for `memory`, without checking the budget: this process has two models."""
    planned = plan_reference(
        path, LoadConfig(memory=memory, context=8192, threads=2, reference=True)
    )
    budget = dataclasses.replace(planned.plan.budget, num_bytes=8 * GIB)
    plan = dataclasses.replace(planned.plan, budget=budget)
    return Engine(dataclasses.replace(planned, plan=plan))


def written_page_by_page(source: Path, target: Path) -> Path:
    """Write a copy page by page, so that the page cache holds it in small folios."""
    with source.open("rb") as whole, target.open("wb", buffering=0) as copy:
        while page := whole.read(PAGE_BYTES):
            copy.write(page)
        os.fsync(copy.fileno())
    return target


def test_decode(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    original = requantised(smollm2, tmp_path / "original.gguf", "F16")
    path = written_page_by_page(original, tmp_path / "f16.gguf")
    streamed, resident = loaded_for(path, "130MiB"), loaded_for(path, "4GiB")
    assert streamed.planned.plan.resident_layers is not None
    assert resident.planned.plan.resident_layers is None

    def decode(loaded: Engine) -> None:
        loaded.model.truncate(32)
        for token_id in range(100, 100 + NUM_DECODED):
            loaded.model.forward((token_id,))

    for loaded in (streamed, resident):
        loaded.model.forward(tuple(range(5, 37)))
    paired(
        benchmark,
        f"streamed weights, {NUM_DECODED} tokens",
        lambda: decode(streamed),
        lambda: decode(resident),
        rounds=15,
        peer="resident weights",
    )
    streamed.close()
    resident.close()
