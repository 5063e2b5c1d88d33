"""Scripted drafts, and runtimes over the fake model that speculate with them at costs of the test's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lowtide import FakeModel, Runtime
from lowtide.attention.policy import PassController
from lowtide.memory.plan.batch import BatchPlan
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.models.draft_tree import TEXT, TokenTree
from lowtide.models.fake_model import FakeSequences
from lowtide.models.model import SequenceBatch, SequenceSlice
from lowtide.runtime.batch import open_batch
from lowtide.runtime.planning.plan import ResolvedModel
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.speculation.step_cost import StepCostModel

CHEAP = CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1))
"""Tokens of a pass cost next to nothing, so everything is verified."""
CHEAP_BATCH = CostCurve(num_rows=(1, 64), seconds=(1.0, 1.1))
FAIR_BATCH = CostCurve(num_rows=(1, 64), seconds=(1.0, 7.3))
"""Ten tokens cost a pass: drafts that are often right pay."""
DEAR = CostCurve(num_rows=(1, 8), seconds=(1.0, 8.0))
"""Every token costs a pass: nothing pays."""
DEAR_BATCH = CostCurve(num_rows=(1, 64), seconds=(1.0, 64.0))


class Ticks:
    """A clock that moves only when the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedDraft(Draft):
    """Proposes the chain of tokens that a function of the text returns."""

    name = "scripted"

    def __init__(self, script: Callable[[Sequence[int]], Sequence[int]]) -> None:
        self._script = script
        self._text: list[int] = []
        self.is_closed = False

    def follow(self, token_ids: Sequence[int]) -> None:
        self._text = list(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        return Proposal.chain(tuple(self._script(self._text))[:num_tokens])

    def close(self) -> None:
        self.is_closed = True


class ScriptedTrees(Draft):
    """Proposes the tree that a function of the text returns."""

    name = "trees"

    def __init__(self, script: Callable[[Sequence[int]], TokenTree]) -> None:
        self._script = script
        self._text: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        self._text = list(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        return Proposal(self._script(self._text))


def perfect(tokens: Sequence[int]) -> ScriptedDraft:
    """Return a draft that knows the tokens after the text's last newline."""

    def rest(text: Sequence[int]) -> Sequence[int]:
        from_end = list(reversed(text)).index(ord("\n"))
        return tokens[from_end:]

    return ScriptedDraft(rest)


def half_right(tokens: Sequence[int], seed: int) -> ScriptedDraft:
    """Return a draft that is right for a random number of tokens and then says anything, also invalid tokens."""
    chance, right = random.Random(seed), perfect(tokens)

    def mixed(text: Sequence[int]) -> Sequence[int]:
        right.follow(text)
        rest = right.propose(chance.randrange(6)).token_ids
        least, most = chance.choice(((0, 259), (-3, 300)))
        return (*rest, *(chance.randrange(least, most) for _ in range(chance.randrange(5))))

    return ScriptedDraft(mixed)


def random_trees(tokens: Sequence[int], seed: int) -> ScriptedTrees:
    """Return a draft whose trees have the next tokens somewhere in them."""
    chance, right = random.Random(seed), perfect(tokens)

    def tree(text: Sequence[int]) -> TokenTree:
        right.follow(text)
        return mixed_tree(right.propose(8).token_ids, chance.randrange(1 << 30))

    return ScriptedTrees(tree)


def mixed_tree(
    rest: Sequence[int], seed: int, *, num_rows: int = 7, num_tokens: int = 259
) -> TokenTree:
    """Return a tree of any shape in which some path begins as `rest` does, beside other tokens."""
    chance = random.Random(seed)
    token_ids, parents = list[int](), list[int]()
    right = {TEXT: 0}  # for each row that is right so far: the tokens of `rest` on its path
    for row in range(chance.randint(1, num_rows)):
        parent = chance.randrange(-1, row)
        at = right.get(parent)
        if at is not None and at < len(rest) and chance.random() < 0.7:
            token_ids.append(rest[at])
            right[row] = at + 1
        else:
            token_ids.append(chance.randrange(num_tokens))
        parents.append(parent)
    return TokenTree(tuple(token_ids), tuple(parents))


def controller_of(
    *drafts: Draft,
    cost: CostCurve = CHEAP,
    max_draft: int = 7,
    clock: Ticks | None = None,
    trees: bool = True,
) -> SpeculationController:
    """Return a controller of one sequence of a fake model."""
    return SpeculationController(
        [drafts],
        StepCostModel(cost, clock or Ticks()),
        max_draft=max_draft,
        vocabulary_size=FakeModel().spec.vocabulary.num_tokens,
        trees=trees,
    )


def speculate_with(runtime: Runtime, controller: SpeculationController | None) -> None:
    """Have single answers of a runtime speculate with this controller."""
    runtime._engine.speculation = controller


def speculate_in_batches(
    monkeypatch: pytest.MonkeyPatch,
    drafts_of: Callable[[int], Sequence[Draft]],
    expected: CostCurve = CHEAP_BATCH,
    cost: CostCurve | None = None,
) -> None:
    """Have batches draft with what `drafts_of` returns for a sequence.

    Passes are expected to cost `expected`; they do so, unless `cost` says otherwise.
    """
    clock, forward = Ticks(), FakeSequences.forward

    def ticking(sequences: FakeSequences, slices: Sequence[SequenceSlice]) -> Any:
        clock.now += (cost or expected).of(sum(len(one.token_ids) for one in slices))
        return forward(sequences, slices)

    def load(
        planned: ResolvedModel,
        plan: BatchPlan,
        _sequences: SequenceBatch,
        _controller: PassController,
    ) -> tuple[SpeculationController, bool]:
        rows = tuple(sorted({1, plan.num_sequences, plan.num_logits}))
        seconds = tuple(expected.of(num_rows) for num_rows in rows)
        controller = SpeculationController(
            [drafts_of(i) for i in range(plan.num_sequences)],
            StepCostModel(CostCurve(num_rows=rows, seconds=seconds), clock),
            max_draft=planned.plan.verify_batch - 1,
            vocabulary_size=planned.spec.vocabulary.num_tokens,
        )
        return controller, True

    monkeypatch.setattr(FakeSequences, "forward", ticking)
    monkeypatch.setattr(open_batch, "load_batch_speculation", load)
