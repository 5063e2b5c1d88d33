"""Sampled tokens with drafts have the target's distribution: draws with drafts against others without."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from batch_drafting import draft_in_batches
from speculating import BranchingDraft, ToldDraft, speculator_of

from lowtide import FakeModel, GenerationResult, Runtime, SamplingParams
from lowtide.models.draft_tree import TokenTree
from lowtide.models.fake_model import TURN_END
from lowtide.runtime.speculation.drafts import Draft

REPLY = "the tide comes in, the tide goes out, the tide comes in again."
PROMPT = "Say it.\n"
SAMPLING = {"temperature": 20.0, "top_k": 8, "top_p": 1.0, "min_p": 0.0}
CHAIN = ToldDraft(lambda _text: b"he")
BRANCHES = BranchingDraft(lambda _text: TokenTree((*b"he0l", 182), (-1, 0, -1, -1, -1)))


def opened(batch_size: int = 64) -> Runtime:
    return Runtime.open(FakeModel([REPLY], batch_size=batch_size), memory="8GiB", speculate="auto")


def third_of(result: GenerationResult) -> int:
    """The third token; that which ends a text counts as one."""
    return result.token_ids[2] if len(result.token_ids) > 2 else TURN_END


def third_tokens(draft: Draft | None, first_seed: int, num_draws: int) -> Counter[int]:
    """The third tokens of answers: they come from the row of the second one, where that was drafted."""
    with opened() as runtime:
        runtime._loaded.speculator = speculator_of(draft) if draft is not None else None
        results = [
            runtime.generate(PROMPT, max_tokens=3, seed=first_seed + i, **SAMPLING)
            for i in range(num_draws)
        ]
    if draft is not None:
        told = [result.stats.speculation for result in results]
        assert sum(stats["accepted"] for stats in told if stats is not None) > num_draws / 20
    return Counter(third_of(result) for result in results)


def require_one_distribution(counts: Counter[int], others: Counter[int]) -> None:
    """Hold the chi-squared statistic of two samples of one size against five deviations."""
    tokens = sorted(set(counts) | set(others))
    ours = np.array([counts[token] for token in tokens], dtype=float)
    theirs = np.array([others[token] for token in tokens], dtype=float)
    statistic = float((((ours - theirs) ** 2) / (ours + theirs)).sum())
    degrees = len(tokens) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("draft", [CHAIN, BRANCHES])
def test_of_one_answer(draft: Draft) -> None:
    require_one_distribution(third_tokens(draft, 0, 3000), third_tokens(None, 3000, 3000))


def test_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_in_batches(monkeypatch, lambda _: [CHAIN])

    def third_tokens_of_batches(speculate: str, first_seed: int) -> Counter[int]:
        counts = Counter[int]()
        model = FakeModel([REPLY], batch_size=128)
        with Runtime.open(model, memory="8GiB", speculate=speculate) as runtime:
            for seed in range(first_seed, first_seed + 1500, 50):
                options = [
                    SamplingParams(max_tokens=3, seed=seed + i, **SAMPLING) for i in range(50)
                ]
                results = runtime.generate_batch([PROMPT] * 50, options)
                counts.update(map(third_of, results))
        assert (max(model.rows) > 50) == (speculate != "off")
        return counts

    require_one_distribution(
        third_tokens_of_batches("auto", 0), third_tokens_of_batches("off", 1500)
    )
