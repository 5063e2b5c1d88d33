"""Weights that are read again for every pass, beside resident ones: the same model, decoded in turn.

An F16 copy of the default model, planned for 130 MiB at a context of 8,192, against the same without a
budget, the file in the system's page cache. Run with `make bench`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from paired import paired
from requantised import requantised

from lowtide.memory.units import GIB
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_reference

pytestmark = pytest.mark.benchmark
NUM_DECODED = 16


def loaded_for(path: Path, memory: str) -> LoadedModel:
    """The model as planned for `memory`; two of them in one process are beyond it, so it is not held."""
    planned = plan_reference(path, OpenOptions(memory=memory, context=8192, threads=2))
    budget = dataclasses.replace(planned.plan.budget, num_bytes=8 * GIB)
    plan = dataclasses.replace(planned.plan, budget=budget)
    return LoadedModel(dataclasses.replace(planned, plan=plan))


def test_decode(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    path = requantised(smollm2, tmp_path / "f16.gguf", "F16")
    streamed, resident = loaded_for(path, "130MiB"), loaded_for(path, "4GiB")
    assert streamed.planned.plan.kept_layers is not None
    assert resident.planned.plan.kept_layers is None

    def decode(loaded: LoadedModel) -> None:
        loaded.model.truncate(32)
        for token_id in range(100, 100 + NUM_DECODED):
            loaded.model.forward((token_id,))

    for loaded in (streamed, resident):
        loaded.model.forward(tuple(range(5, 37)))
    paired(
        benchmark,
        f"weights read again for every pass, {NUM_DECODED} tokens",
        lambda: decode(streamed),
        lambda: decode(resident),
        rounds=15,
        peer="resident weights",
    )
    streamed.close()
    resident.close()
