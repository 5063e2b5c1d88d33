"""Batches on llama.cpp: the tokens of each prompt alone, in planned memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from processes import run_python

from lowtide import AttentionPolicy, Gem, LowtideError, OverBudget, Runtime, SamplingParams
from lowtide.models.model import SequenceSlice
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

PREFIX = (
    "The harbour lies behind a long wall of grey stone. At low tide the boats rest on the mud. " * 5
)
ENDS = (
    "Why is the sea salty?",
    "List the boats:",
    "The children walk between them with buckets, and at high tide the ferry comes in. The",
    "Nobody",
)
PROMPTS = [PREFIX + end for end in ENDS]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )


@pytest.fixture(scope="module")
def dense(random_model: Path) -> Iterator[Runtime]:
    with Runtime.open(
        random_model, memory="4GiB", context=1024, threads=2, attention="dense"
    ) as runtime:
        yield runtime


def test_greedy_answers_of_a_real_model_are_those_of_each_prompt_alone(smollm2: Path) -> None:
    with Runtime.open(
        smollm2, memory="4GiB", context=1024, threads=1, attention="dense"
    ) as runtime:
        options = [SamplingParams(max_tokens=n, temperature=0) for n in (24, 12, 24, 8)]
        alone = [runtime.generate(*one) for one in zip(PROMPTS, options, strict=True)]
        together = runtime.generate_batch(PROMPTS, options)
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]
        assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
        batch = together[0].stats.batch
        assert batch is not None and batch["identical"]
        assert [r.stats.reused_tokens > 90 for r in together] == [False, True, True, True]
        assert together[0].stats.layers_native == together[0].stats.layers == 30
        hook = runtime._engine.hook
        assert hook is not None and hook.layouts_refused == 0


def test_logits_are_bit_for_bit_those_of_a_sequence_alone(dense: Runtime) -> None:
    model, hook = dense._model, dense._engine.hook
    assert hook is not None
    tails = [[(7 * i + k) % 300 for k in range(n)] for i, n in enumerate((1, 9, 40, 3))]
    shared = [(3 * k) % 290 for k in range(270)]
    expected = []
    for i, tail in enumerate(tails):
        model.truncate(0)
        rows = [*shared, *tail]
        for start in range(0, len(rows), 100):
            logits = model.forward(rows[start : start + 100]).copy()
        steps = [model.forward([i + step]).copy() for step in range(3)]
        expected.append([logits, *steps])
    sequences = model.open_sequences(4, 512)
    try:
        for start in range(0, len(shared), 90):
            sequences.forward([SequenceSlice(0, shared[start : start + 90], num_logits=0)])
        for sequence in (1, 2, 3):
            sequences.copy_prefix(0, sequence, len(shared))
        found = [sequences.forward([SequenceSlice(i, tail) for i, tail in enumerate(tails)]).copy()]
        for step in range(3):
            slices = [SequenceSlice(i, [i + step]) for i in range(4)]
            found.append(sequences.forward(slices).copy())
    finally:
        sequences.close()
    for i in range(4):
        for step in range(4):
            assert np.array_equal(found[step][i], expected[i][step])
    assert hook.layouts_refused == 0


def test_other_slots_than_expected_are_noticed_and_all_keys_attended_to(
    dense: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = dense._engine.hook
    assert hook is not None
    refused = hook.layouts_refused

    def passes() -> np.ndarray:  # type: ignore[type-arg]
        sequences = dense._model.open_sequences(2, 256)
        try:
            logits = sequences.forward(
                [SequenceSlice(0, [1, 2, 3]), SequenceSlice(1, [4, 5])]
            ).copy()
        finally:
            sequences.close()
        return logits

    expected, set_layout = passes(), hook.set_batch_layout

    def set_wrong_layout(slots):  # type: ignore[no-untyped-def]
        if slots is not None:
            slots.own[0][-1] = 200
        set_layout(slots)

    monkeypatch.setattr(hook, "set_batch_layout", set_wrong_layout)
    found = passes()
    assert hook.layouts_refused > refused
    assert np.allclose(found, expected, atol=1e-3)


def test_answers_from_other_slots_than_expected_are_not_called_identical(
    dense: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = dense._engine.hook
    assert hook is not None
    set_layout = hook.set_batch_layout

    def wrong(cells):  # type: ignore[no-untyped-def]
        if cells is not None:
            cells.own[0][-1] = 0 if cells.own[0][-1] else 1
        set_layout(cells)

    monkeypatch.setattr(hook, "set_batch_layout", wrong)
    batch = dense.generate_batch(PROMPTS, max_tokens=3, temperature=0)[0].stats.batch
    assert batch is not None and not batch["identical"]
    assert "other slots" in batch["nondeterminism"]


def test_nondeterminism_is_reported(random_model: Path) -> None:
    options = {"memory": "4GiB", "context": 512, "threads": 1, "reference": True}
    with Runtime.open(random_model, **options) as runtime:  # type: ignore[arg-type]
        before = runtime.generate("tide", max_tokens=4, temperature=0).token_ids
        results = runtime.generate_batch(["tide", "sea"], max_tokens=4, temperature=0)
        again = runtime.generate("tide", max_tokens=4, temperature=0)
    assert len(results) == 2 and before == again.token_ids
    batch = results[0].stats.batch
    assert batch is not None and not batch["identical"]
    assert "attention='dense'" in batch["nondeterminism"]


@pytest.mark.parametrize("attention", ["tidal:k=100,layers=1", Gem(layer=1, k=100, continues=True)])
def test_attention_that_selects_keys_of_one_sequence_is_refused(
    random_model: Path, attention: str | AttentionPolicy
) -> None:
    with Runtime.open(random_model, memory="4GiB", context=512, attention=attention) as runtime:
        with pytest.raises(LowtideError, match="set attention='dense' or attention='llama'"):
            runtime.generate_batch(["tide", "sea"])
        assert runtime.generate("tide", max_tokens=2).finish_reason == "length"
    with pytest.raises(LowtideError, match="cannot run 3 answers together"):
        plan_reference(
            random_model,
            LoadConfig(memory="4GiB", context=512, attention=attention, sequences=3),
        )


def test_the_peak_stays_inside_the_budget_where_the_batch_uses_the_models_cache(
    smollm2: Path,
) -> None:
    """The plan takes all of the budget; the batch uses the memory of the evicted KV cache."""
    measured = run_python(
        f"""
from lowtide import OverBudget, Runtime
with Runtime.open({str(smollm2)!r}, memory="230MiB", context=4096, threads=1) as runtime:
    runtime.generate("one two three four " * 40, max_tokens=2)
    prompts = ["one two three four " * 60 + str(i) for i in range(8)]
    results = runtime.generate_batch(prompts, max_tokens=8, temperature=0)
    stats = results[0].stats
    assert stats.batch["num_bytes"] > runtime.plan.budget.num_bytes - runtime.plan.total_bytes
    assert stats.planned_bytes <= runtime.plan.budget.num_bytes
    try:
        runtime.generate_batch(["one " + str(i) for i in range(8)], max_tokens=1500)
    except OverBudget as error:
        print(error)
    assert len(runtime.generate("one", max_tokens=2).token_ids) == 2
    print(runtime.plan.budget.num_bytes)
"""
    )
    assert measured.code == 0, measured.stderr
    *_, refusal, budget = measured.stdout.splitlines()
    assert "are free" in refusal
    assert measured.peak_bytes <= int(budget)


def test_a_batch_over_the_budget_is_refused_before_anything_is_allocated(dense: Runtime) -> None:
    ledger = dense.ledger
    budget_bytes, ledger.budget_bytes = ledger.budget_bytes, ledger.reserved_bytes
    try:
        with pytest.raises(OverBudget, match="lower max_tokens"):
            dense.generate_batch([f"tide {i}" for i in range(30)], max_tokens=900)
    finally:
        ledger.budget_bytes = budget_bytes
    assert dense.generate_batch(["tide"], max_tokens=2)[0].finish_reason == "length"
