"""Several sequences in one llama.cpp cache: truncated tokens leave no trace, and their slots are reused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from gguf_files import write_model

from lowtide import Runtime
from lowtide.models.errors import ForwardError
from lowtide.models.model import SequenceBatch, SequenceSlice

SHARED = [(3 * k) % 290 for k in range(70)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    path = write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )
    with Runtime.open(path, memory="4GiB", context=1024, threads=2, attention="dense") as runtime:
        yield runtime


@pytest.fixture
def sequences(dense: Runtime) -> Iterator[SequenceBatch]:
    """Four sequences with a common prefix, and lowtide's attention over the slots of each."""
    batch = dense._model.open_sequences(4, 512, max_logits=24)
    batch.forward([SequenceSlice(0, SHARED, num_logits=0)])
    for sequence in (1, 2, 3):
        batch.copy_prefix(0, sequence, len(SHARED))
    yield batch
    batch.close()


def test_logits_after_truncating_equal_those_of_a_sequence_alone(
    dense: Runtime, sequences: SequenceBatch
) -> None:
    """Tokens are appended and truncated at random, so that slots are reused across sequences."""
    chance, hook = random.Random(5), dense._engine.hook
    assert hook is not None
    refused = hook.layouts_refused
    texts: list[list[int]] = [[] for _ in range(4)]
    found: list[list[np.ndarray]] = [[] for _ in range(4)]  # type: ignore[type-arg]
    for _ in range(25):
        slices = [
            SequenceSlice(i, [chance.randrange(300) for _ in range(count)], num_logits=count)
            for i, count in enumerate(chance.choices((1, 2, 4, 6), k=4))
            if chance.random() < 0.8
        ]
        if not slices:
            continue
        logits, at = sequences.forward(slices).copy(), 0
        for part in slices:
            accepted = chance.randint(1, len(part.token_ids))
            texts[part.sequence] += part.token_ids[:accepted]
            found[part.sequence].extend(logits[at : at + accepted])
            at += len(part.token_ids)
            sequences.truncate(part.sequence, len(SHARED) + len(texts[part.sequence]))
    assert hook.layouts_refused == refused
    for text, rows in zip(texts, found, strict=True):
        dense._model.truncate(0)
        dense._model.forward(SHARED)
        for token_id, row in zip(text, rows, strict=True):
            assert np.array_equal(dense._model.forward([token_id]), row)


def test_slots_of_truncated_tokens_are_reused(sequences: SequenceBatch) -> None:
    num_truncated = 5
    for start in range(0, 512 - len(SHARED), num_truncated):
        room = min(num_truncated, 512 - len(SHARED) - start)
        sequences.forward([SequenceSlice(1, [7] * room)])
        sequences.truncate(1, len(SHARED) + start)
        sequences.forward([SequenceSlice(1, [7] * room)])
    with pytest.raises(ForwardError, match="0 of 512 slots are free"):
        sequences.forward([SequenceSlice(2, [7])])
    sequences.truncate(1, 0)
    assert sequences.forward([SequenceSlice(2, [7])]).shape[0] == 1


def test_too_many_logits_are_an_error_and_not_an_abort(
    sequences: SequenceBatch,
) -> None:
    with pytest.raises(
        ForwardError, match="logits of 25 of 25 tokens were requested; the plan allows 24"
    ):
        sequences.forward([SequenceSlice(0, [1] * 25, num_logits=25)])
    with pytest.raises(ForwardError, match="logits of 2 of 1 tokens were requested"):
        sequences.forward([SequenceSlice(0, [1], num_logits=2)])
    assert sequences.forward([SequenceSlice(0, [1] * 24, num_logits=24)]).shape[0] == 24


def test_closed_sequences_cannot_be_truncated(dense: Runtime) -> None:
    closed = dense._model.open_sequences(2, 256)
    closed.close()
    with pytest.raises(ForwardError, match="closed"):
        closed.truncate(0, 0)
