"""Delta's store: groups in the cache's place, on the default model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grown_memory import grown

from lowtide import GenerationResult, Runtime
from lowtide.memory.plan.estimates import kv_bytes
from lowtide.memory.plan.line import CACHE
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.spec import read_spec
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

TEXT = (Path(__file__).resolve().parents[1] / "test_kernels.py").read_text()
HALF = "delta:sparsity=0.5,window=96"
OPTIONS = {"memory": "2GiB", "context": 1024, "threads": 2}


def loaded(smollm2: Path, attention: str) -> Engine:
    return Engine(plan_reference(smollm2, LoadConfig(attention=attention, **OPTIONS)))


def read(made: Engine, num_tokens: int, rows: int) -> bytes:
    """Bring the cache to so many tokens, in passes of `rows`; return the last logits."""
    model, logits = made.model, b""
    token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    while model.num_tokens < num_tokens:
        at = model.num_tokens
        made.controller.begin_prefill()
        logits = model.forward(token_ids[at : min(at + rows, num_tokens)]).tobytes()
    return logits


@pytest.fixture(scope="module")
def stored(smollm2: Path) -> Iterator[Engine]:
    made = loaded(smollm2, f"{HALF},store=1")
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> bytes:
    made = loaded(smollm2, HALF)
    logits = read(made, 700, 128)
    made.close()
    return logits


@pytest.mark.parametrize("rows", [128, 77, 31])
def test_answers_are_those_of_groups_beside_the_cache(
    stored: Engine, expected: bytes, rows: int
) -> None:
    stored.model.truncate(0)
    assert read(stored, 700, rows) == expected
    assert stored.hook is not None and stored.hook.min_tokens > 500


def test_a_few_tokens_can_be_taken_back_and_more_are_read_anew(
    stored: Engine, expected: bytes
) -> None:
    model, hook = stored.model, stored.hook
    assert isinstance(model, GgufModel) and hook is not None
    model.truncate(0)
    read(stored, 720, 40)
    assert model.truncate(690) == 690
    assert read(stored, 700, 1) == expected
    assert model.truncate(300) == 0
    assert hook.min_tokens == 0 and not hook.has_lost_keys
    assert read(stored, 700, 128) == expected


def test_a_conversation_that_changes_its_beginning_is_answered_all_the_same(smollm2: Path) -> None:
    asked = [
        [{"role": "user", "content": f"{TEXT[begin : begin + 1500]}\nWhat is this?"}]
        for begin in (0, 900, 0)
    ]
    answers = []
    for attention in (f"{HALF},refine=0", f"{HALF},store=1"):
        with Runtime.open(smollm2, attention=attention, **OPTIONS) as runtime:
            answers.append(
                [
                    GenerationResult.of(runtime.chat(m, max_tokens=6, temperature=0)).token_ids
                    for m in asked
                ]
            )
    assert answers[0] == answers[1]


def test_the_plan_has_less_of_a_cache_and_keeps_to_it(smollm2: Path) -> None:
    opened = {"memory": "2GiB", "context": 8192, "threads": 2}
    whole, short = (
        next(
            row
            for row in plan_reference(
                smollm2, LoadConfig(attention=f"{HALF}{store}", **opened)
            ).plan.rows
            if row.component == CACHE
        )
        for store in ("", ",store=1")
    )
    assert short.num_bytes < 0.1 * whole.num_bytes
    assert "in groups alone" in short.why


def test_what_is_resident_shrinks(smollm2: Path) -> None:
    """Half as many groups stand beside the cache, or in its place."""
    beside, alone = (grown(smollm2, f"{HALF}{store}", 2048) for store in ("", ",store=1"))
    assert alone.peak_bytes <= alone.planned_bytes < beside.planned_bytes
    cache_bytes = kv_bytes(read_spec(smollm2), 2048, "f16")
    assert alone.num_bytes < beside.num_bytes - 0.7 * cache_bytes


@pytest.mark.parametrize(
    ("attention", "more", "message"),
    [
        ("delta:store=2", {}, "delta's store is 2, 0 or 1 is wanted"),
        ("delta:store=1,prompts=exact", {}, "store keeps nothing but groups"),
        ("delta:store=1", {"prefix_cache": "8MiB"}, "delta's store keeps no states to put there"),
    ],
)
def test_what_cannot_be_is_refused(
    attention: str, more: dict[str, str], message: str, smollm2: Path
) -> None:
    with pytest.raises(BadOption, match=message):
        LoadConfig(attention=attention, **more).policy(read_spec(smollm2))


def test_a_dense_pass_over_what_was_replaced_is_noticed(stored: Engine) -> None:
    stored.model.truncate(0)
    read(stored, 700, 128)
    assert stored.hook is not None
    stored.hook.start_pass(sparse=False)
    stored.model.forward((1,))
    with pytest.raises(LowtideError, match="store had replaced"):
        stored.controller.begin_decode()
    stored.model.truncate(0)
    read(stored, 100, 100)
