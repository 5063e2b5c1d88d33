"""Draft trees on llama.cpp: the logits of each row are those of its path alone, and so is the cache after it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import promising_drafts
import pytest
from gguf_files import write_model
from processes import run_python
from promising_drafts import largest_speculation
from speculating import CHEAP, ScriptedTrees, mixed_tree

from lowtide import Runtime
from lowtide.models.draft_tree import TokenTree
from lowtide.models.gguf.draft_tree import GgufTreeModel
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.speculation.step_cost import StepCostModel

SUPPORT = Path(promising_drafts.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _speculation_as_large_as_allowed() -> Iterator[None]:
    with largest_speculation():
        yield


OPTIONS = {"memory": "4GiB", "context": 512, "threads": 2, "attention": "dense"}
PROMPT = "The harbour lies behind a wall of grey stone, and at low tide"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_0"])
def trees(request: pytest.FixtureRequest, random_model: Path) -> Iterator[Runtime]:
    options = {**OPTIONS, "kv_type": request.param, "speculate": "ngram:draft=7"}
    with Runtime.open(random_model, **options) as runtime:
        yield runtime


def model_of(runtime: Runtime) -> GgufTreeModel:
    model = runtime._model
    assert isinstance(model, GgufTreeModel) and model.verifies_trees
    return model


def read(model: GgufTreeModel, token_ids: Sequence[int]) -> None:
    model.truncate(0)
    for start in range(0, len(token_ids), 32):
        model.forward(token_ids[start : start + 32])


@pytest.mark.parametrize("seed", range(6))
def test_a_row_and_what_follows_it_have_the_bits_of_its_path_alone(
    trees: Runtime, seed: int
) -> None:
    model, chance = model_of(trees), random.Random(seed)
    text = [chance.randrange(300) for _ in range(chance.choice((3, 63, 70, 260)))]
    tree = mixed_tree((), seed, num_tokens=300).with_root(7).trunk_first()
    read(model, text)
    found = model.forward_tree(tree).copy()
    assert model.verifies_trees and len(found) == len(tree)
    for row in range(len(tree)):
        path = [tree.token_ids[before] for before in tree.path(row)]
        read(model, text)
        for token_id in path:
            alone = model.forward((token_id,)).copy()
        after = model.forward((11,)).copy()
        assert np.array_equal(found[row], alone)
        read(model, text)
        model.forward_tree(tree)
        for before in tree.path(row):
            model.commit_branch(before)
        assert model.truncate(len(text) + len(path)) == len(text) + len(path)
        assert np.array_equal(model.forward((11,)), after)
    assert model.verifies_trees


def test_answers_with_trees_are_those_of_the_plain_loop(smollm2: Path) -> None:
    params = {"max_tokens": 40, "temperature": 0.7, "seed": 5}
    with Runtime.open(smollm2, **OPTIONS) as plain:  # type: ignore[arg-type]
        expected = plain.generate(PROMPT, **params)
        plain._session.sync()
        logits = plain._session.decode_token(11).copy()
    with Runtime.open(smollm2, **OPTIONS, speculate="ngram") as runtime:  # type: ignore[arg-type]
        num_prompt = len(
            runtime._model.tokenizer.encode(PROMPT, add_special=True, parse_special=False)
        )

        def tree(text: Sequence[int]) -> TokenTree:
            rest = expected.token_ids[len(text) - num_prompt :]
            return mixed_tree(rest, len(text), num_tokens=49_000)

        runtime._engine.speculation = SpeculationController(
            [[ScriptedTrees(tree)]],
            StepCostModel(CHEAP),
            max_draft=7,
            vocabulary_size=runtime.spec.vocabulary.num_tokens,
            trees=True,
        )
        result = runtime.generate(PROMPT, **params)
        runtime._session.sync()
        assert np.array_equal(runtime._session.decode_token(11), logits)
        assert model_of(runtime).verifies_trees
    assert result.token_ids == expected.token_ids
    stats = result.stats.speculation
    assert stats is not None and stats["identical"]
    assert stats["accepted_on_branches"] > 3


def test_where_slots_differ_only_trunks_are_verified_from_then_on(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = TokenTree((5, 6, 7, 8), (-1, 0, 1, 0))
    with Runtime.open(random_model, **OPTIONS, speculate="ngram") as runtime:  # type: ignore[arg-type]
        model, hook = model_of(runtime), runtime._engine.hook
        assert hook is not None
        read(model, [3] * 40)
        expected = model.forward_tree(tree)[:3].copy()
        model.truncate(40)
        set_layout = hook.set_batch_layout
        monkeypatch.setattr(
            hook,
            "set_batch_layout",
            lambda cells: set_layout(
                cells and type(cells)(num_shared=39, **_without_shared(cells))
            ),
        )
        found = model.forward_tree(tree)
        assert not model.verifies_trees and model.num_tokens == 43
        assert np.array_equal(found, expected)
        monkeypatch.undo()
        assert len(model.forward_tree(tree)) == 3


def _without_shared(cells: object) -> dict[str, object]:
    return {name: getattr(cells, name) for name in ("num_rows", "own")}


@pytest.mark.parametrize("cell", [-1, 1 << 20])
def test_no_slot_outside_the_pass_is_copied(random_model: Path, cell: int) -> None:
    with Runtime.open(random_model, **OPTIONS, speculate="ngram") as runtime:  # type: ignore[arg-type]
        model, hook = model_of(runtime), runtime._engine.hook
        assert hook is not None
        read(model, [3] * 40)
        assert hook.copy_slot(1, 2) == 0, "no batch layout yet"
        model.forward_tree(TokenTree((5, 6, 7), (-1, 0, 0)))
        assert hook.copy_slot(41, 41) == runtime.spec.num_layers
        assert hook.copy_slot(cell, 41) == hook.copy_slot(41, cell) == 0


def test_branches_take_no_more_memory_of_llama_cpp(smollm2: Path) -> None:
    import dataclasses

    simulated = SimulatedGguf(read_spec(smollm2))
    try:
        simulated.context(1024, 32, "f16")
        options = next(iter(simulated._contexts))
        alone, many = (
            simulated._measured(dataclasses.replace(options, verify_batch=8, sequences=sequences))
            for sequences in (1, 8)
        )
    finally:
        simulated.close()
    assert many == alone


def test_branches_stay_inside_the_plan(smollm2: Path) -> None:
    measured = run_python(
        f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from promising_drafts import largest_speculation
from lowtide import Runtime
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.runtime.speculation.step_cost import StepCostModel
options = dict(memory="400MiB", context=512, threads=1, attention="dense", speculate="auto:draft=15")
with largest_speculation(), Runtime.open({str(smollm2)!r}, **options) as runtime:
    runtime._engine.speculation.costs = StepCostModel(CostCurve(num_rows=(1, 16), seconds=(1.0, 1.01)))
    prompt = "one two three one two four one two five " * 40
    result = runtime.generate(prompt, max_tokens=80, temperature=1.5, seed=3)
    stats = result.stats.speculation
    assert stats["rounds"] > 0 and stats["accepted_on_branches"] > 0, stats
    print(runtime.plan.total_bytes)
"""
    )
    assert measured.code == 0, measured.stderr
    planned = int(measured.stdout.split()[-1])
    assert measured.peak_bytes <= planned
