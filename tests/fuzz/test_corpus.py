"""Replays the corpus of each fuzz target: what once failed must not fail again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("fuzz_targets", HERE / "targets.py")
assert _spec is not None and _spec.loader is not None
targets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(targets)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_corpus_of_a_target_is_answered_or_refused(target: str) -> None:
    inputs = sorted((HERE / "corpus" / target).iterdir())
    assert len(inputs) >= 3, "the corpus is missing"
    for path in inputs:
        data = path.read_bytes()
        targets.TARGETS[target](data)
        targets.TARGETS[target](data[: len(data) // 2])
        targets.TARGETS[target](data[len(data) // 2 :])
