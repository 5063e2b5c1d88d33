"""On a real model: logits of drafts go back to the ledger and the system between turns, and answers stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from promising_drafts import largest_speculation

from lowtide import Runtime
from lowtide.memory.plan.line import SPECULATION
from lowtide.memory.process import read_process_memory
from lowtide.runtime.loading.logits_memory import LogitsMemory

pytestmark = pytest.mark.real
PROMPTS = ("Name some fruit.", "Tell me a story about a fox.", "What is the sea?", "Count to ten.")


def test_released_logits_are_computed_anew(smollm2: Path) -> None:
    with (
        largest_speculation(),
        Runtime.open(
            smollm2, memory="2GiB", context=512, threads=2, speculate="auto:draft=31"
        ) as runtime,
    ):
        model, ledger = runtime._model, runtime.ledger
        row_bytes = 4 * runtime.spec.vocabulary.num_tokens
        memory = LogitsMemory(
            model, ledger, planned_rows=32, vocabulary_size=runtime.spec.vocabulary.num_tokens
        )
        planned = ledger.components[SPECULATION]
        token_ids = list(range(100, 132))
        before = model.forward_rows(token_ids).copy()
        model.truncate(0)
        resident = read_process_memory().resident_bytes
        assert memory.keep(2)
        given_back = planned - ledger.components[SPECULATION]
        assert 29 * row_bytes < given_back <= 30 * row_bytes
        # What the ledger got, the system got: but for what the process took meanwhile.
        fell = resident - read_process_memory().resident_bytes
        assert fell >= given_back - row_bytes
        assert memory.keep(32) and ledger.components[SPECULATION] == planned
        assert np.array_equal(model.forward_rows(token_ids), before)
        model.truncate(0)


def test_answers_of_a_conversation_that_is_replanned_are_the_plain_ones(smollm2: Path) -> None:
    options = {"memory": "2GiB", "context": 2048, "threads": 2}
    hot = {"max_tokens": 64, "temperature": 1.6}
    with Runtime.open(smollm2, **options) as plain:
        expected = [
            plain.generate(PROMPTS[i % 4], seed=i, **hot).token_ids  # type: ignore[arg-type]
            for i in range(16)
        ]
    with Runtime.open(smollm2, **options, speculate="auto") as runtime:
        planned = runtime.ledger.components[SPECULATION]
        rows, held = list[int](), list[int]()
        for i, token_ids in enumerate(expected):
            result = runtime.generate(PROMPTS[i % 4], seed=i, **hot)  # type: ignore[arg-type]
            assert result.token_ids == token_ids
            assert result.stats.speculation is not None
            rows.append(result.stats.speculation["draft_tokens"])
            held.append(runtime.ledger.components[SPECULATION])
    assert max(held) == planned and held[-1] < planned
    assert rows[-1] < max(rows) and rows[0] == runtime.plan.verify_batch - 1
