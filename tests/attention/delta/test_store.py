"""Delta's store: groups in the cache's place, on the default model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowtide import GenerationResult, Runtime
from lowtide.memory.owners import CACHE
from lowtide.models.errors import BadOption
from lowtide.models.gguf_header import read_spec
from lowtide.models.gguf_model import GgufModel
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_reference

TEXT = (Path(__file__).resolve().parents[1] / "test_kernels.py").read_text()
HALF = "delta:sparsity=0.5,window=96"
OPTIONS = {"memory": "2GiB", "context": 1024, "threads": 2}


def loaded(smollm2: Path, attention: str) -> LoadedModel:
    return LoadedModel(plan_reference(smollm2, OpenOptions(attention=attention, **OPTIONS)))


def read(made: LoadedModel, num_tokens: int, rows: int) -> bytes:
    """Bring the cache to so many tokens, in passes of `rows`; return the last logits."""
    model, logits = made.model, b""
    token_ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    while model.num_tokens < num_tokens:
        at = model.num_tokens
        made.steering.before_prompt()
        logits = model.forward(token_ids[at : min(at + rows, num_tokens)]).tobytes()
    return logits


@pytest.fixture(scope="module")
def stored(smollm2: Path) -> Iterator[LoadedModel]:
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
    stored: LoadedModel, expected: bytes, rows: int
) -> None:
    stored.model.truncate(0)
    assert read(stored, 700, rows) == expected
    assert stored.hook is not None and stored.hook.least_cells > 500


def test_a_few_tokens_can_be_taken_back_and_more_are_read_anew(
    stored: LoadedModel, expected: bytes
) -> None:
    model, hook = stored.model, stored.hook
    assert isinstance(model, GgufModel) and hook is not None
    model.truncate(0)
    read(stored, 720, 40)
    assert model.truncate(690) == 690
    assert read(stored, 700, 1) == expected
    assert model.truncate(300) == 0
    assert hook.least_cells == 0 and not hook.has_lost_keys
    assert read(stored, 700, 128) == expected


def test_a_conversation_that_changes_its_beginning_is_answered_all_the_same(smollm2: Path) -> None:
    asked = [
        [{"role": "user", "content": f"{TEXT[begin : begin + 1500]}\nWhat is this?"}]
        for begin in (0, 900, 0)
    ]
    answers = []
    for attention in (HALF, f"{HALF},store=1"):
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
                smollm2, OpenOptions(attention=f"{HALF}{store}", **opened)
            ).plan.rows
            if row.owner == CACHE
        )
        for store in ("", ",store=1")
    )
    assert short.num_bytes < 0.1 * whole.num_bytes
    assert "in groups alone" in short.why


RESIDENT = """
import json, sys
from lowtide.memory.meter import read_process_memory
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.planning import OpenOptions, plan_reference
made = LoadedModel(plan_reference(sys.argv[1], OpenOptions(
    attention=sys.argv[2], memory="2GiB", context=4096, threads=2)))
before = read_process_memory().resident_bytes
ids = list(range(1000, 1000 + 128))
for _ in range(24):
    made.steering.before_prompt()
    made.model.forward(ids)
print(json.dumps([read_process_memory().resident_bytes - before, made.planned.plan.total_bytes,
                  read_process_memory().peak_bytes]))
made.close()
"""


def test_what_is_resident_shrinks(smollm2: Path) -> None:
    def grown(attention: str) -> int:
        command = [sys.executable, "-c", RESIDENT, str(smollm2), attention]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        growth, planned, peak = json.loads(found.stdout)
        assert peak <= planned
        return int(growth)

    # 3,072 tokens of 45 KiB each in the cache, half as many groups beside it or in its place.
    beside, alone = grown(HALF), grown(f"{HALF},store=1")
    assert alone < beside - 0.8 * 3072 * 30 * 2 * 384


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
        OpenOptions(attention=attention, **more).policy(read_spec(smollm2))


def test_a_dense_pass_over_what_was_replaced_is_noticed(stored: LoadedModel) -> None:
    from lowtide.models.errors import LowtideError

    stored.model.truncate(0)
    read(stored, 700, 128)
    assert stored.hook is not None
    stored.hook.start_pass(sparse=False)
    stored.model.forward((1,))
    with pytest.raises(LowtideError, match="store had replaced"):
        stored.steering.before_decode()
    stored.model.truncate(0)
    read(stored, 100, 100)
