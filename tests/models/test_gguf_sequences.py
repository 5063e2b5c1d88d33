"""Several sequences in one llama.cpp cache: what is taken off leaves no trace, and leaves its cells."""

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
    """Four sequences that begin with the same tokens, and attention that is told of their cells."""
    hook = dense._loaded.hook
    assert hook is not None
    opened = dense._model.open_sequences(4, 512, max_logits=24)
    opened.before_pass = hook.set_batch_layout  # type: ignore[attr-defined]
    opened.forward([SequenceSlice(0, SHARED, num_logits=0)])
    opened.share()
    yield opened
    opened.close()
    hook.set_batch_layout(None)


def test_rows_behind_what_was_taken_off_are_bit_for_bit_those_of_a_sequence_alone(
    dense: Runtime, sequences: SequenceBatch
) -> None:
    """Rows come, some of them go, and others lie where they lay, among those of other sequences."""
    chance, hook = random.Random(5), dense._loaded.hook
    assert hook is not None
    refused = hook.layouts_refused
    texts: list[list[int]] = [[] for _ in range(4)]
    found: list[list[np.ndarray]] = [[] for _ in range(4)]  # type: ignore[type-arg]
    for _ in range(25):
        parts = [
            SequenceSlice(i, [chance.randrange(300) for _ in range(count)], num_logits=count)
            for i, count in enumerate(chance.choices((1, 2, 4, 6), k=4))
            if chance.random() < 0.8
        ]
        if not parts:
            continue
        rows, at = sequences.forward(parts).copy(), 0
        for part in parts:
            kept = chance.randint(1, len(part.token_ids))
            texts[part.sequence] += part.token_ids[:kept]
            found[part.sequence].extend(rows[at : at + kept])
            at += len(part.token_ids)
            sequences.truncate(part.sequence, len(SHARED) + len(texts[part.sequence]))
    sequences.before_pass = None  # type: ignore[attr-defined]
    hook.set_batch_layout(None)
    assert hook.layouts_refused == refused
    for text, logits in zip(texts, found, strict=True):
        dense._model.truncate(0)
        dense._model.forward(SHARED)
        for token_id, row in zip(text, logits, strict=True):
            assert np.array_equal(dense._model.forward([token_id]), row)


def test_cells_of_what_is_taken_off_are_room_for_more(sequences: SequenceBatch) -> None:
    taken_off = 5
    for start in range(0, 512 - len(SHARED), taken_off):
        room = min(taken_off, 512 - len(SHARED) - start)
        sequences.forward([SequenceSlice(1, [7] * room)])
        sequences.truncate(1, len(SHARED) + start)
        sequences.forward([SequenceSlice(1, [7] * room)])
    with pytest.raises(ForwardError, match="0 of 512 cells are free"):
        sequences.forward([SequenceSlice(2, [7])])
    sequences.truncate(1, 0)
    assert sequences.forward([SequenceSlice(2, [7])]).shape[0] == 1


def test_more_logits_than_are_planned_are_an_error_and_not_an_abort(
    sequences: SequenceBatch,
) -> None:
    with pytest.raises(ForwardError, match="logits of 25 rows of 25 are wanted, 24 are planned"):
        sequences.forward([SequenceSlice(0, [1] * 25, num_logits=25)])
    with pytest.raises(ForwardError, match="logits of 2 rows of 1 are wanted"):
        sequences.forward([SequenceSlice(0, [1], num_logits=2)])
    assert sequences.forward([SequenceSlice(0, [1] * 24, num_logits=24)]).shape[0] == 24


def test_closed_sequences_forget_nothing(dense: Runtime) -> None:
    closed = dense._model.open_sequences(2, 256)
    closed.close()
    with pytest.raises(ForwardError, match="closed"):
        closed.truncate(0, 0)
