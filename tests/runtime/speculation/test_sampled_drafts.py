"""Sampled tokens with drafts have the target's distribution: draws with drafts against draws without."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from speculating import ScriptedDraft, ScriptedTrees, controller_of, speculate_in_batches

from lowtide import FakeModel, GenerationResult, Runtime, SamplingParams
from lowtide.models.draft_tree import TokenTree
from lowtide.models.fake_model import TURN_END
from lowtide.runtime.speculation.drafts import Draft

REPLY = "the tide comes in, the tide goes out, the tide comes in again."
PROMPT = "Say it.\n"
SAMPLING = {"temperature": 20.0, "top_k": 8, "top_p": 1.0, "min_p": 0.0}
CHAIN = ScriptedDraft(lambda _text: b"he")
BRANCHES = ScriptedTrees(lambda _text: TokenTree((*b"he0l", 182), (-1, 0, -1, -1, -1)))


def open_runtime(batch_size: int = 64) -> Runtime:
    return Runtime.open(FakeModel([REPLY], batch_size=batch_size), memory="8GiB", speculate="auto")


def third_of(result: GenerationResult) -> int:
    """Return the third token; the end-of-text token counts."""
    return result.token_ids[2] if len(result.token_ids) > 2 else TURN_END


def third_tokens(draft: Draft | None, first_seed: int, num_draws: int) -> Counter[int]:
    """Count the third tokens of answers: their logits come from the second token's row where that was drafted."""
    with open_runtime() as runtime:
        runtime._engine.speculation = controller_of(draft) if draft is not None else None
        results = [
            runtime.generate(PROMPT, max_tokens=3, seed=first_seed + i, **SAMPLING)
            for i in range(num_draws)
        ]
    if draft is not None:
        stats_of = [result.stats.speculation for result in results]
        assert sum(stats["accepted"] for stats in stats_of if stats is not None) > num_draws / 20
    return Counter(third_of(result) for result in results)


def require_one_distribution(counts: Counter[int], others: Counter[int]) -> None:
    """Require that the chi-squared statistic of two equal samples is within five standard deviations."""
    tokens = sorted(set(counts) | set(others))
    first = np.array([counts[token] for token in tokens], dtype=float)
    second = np.array([others[token] for token in tokens], dtype=float)
    statistic = float((((first - second) ** 2) / (first + second)).sum())
    degrees = len(tokens) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("draft", [CHAIN, BRANCHES])
def test_single_answers(draft: Draft) -> None:
    require_one_distribution(third_tokens(draft, 0, 3000), third_tokens(None, 3000, 3000))


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    speculate_in_batches(monkeypatch, lambda _: [CHAIN])

    def third_tokens_of_batches(speculate: str, first_seed: int) -> Counter[int]:
        counts = Counter[int]()
        accepted = 0
        model = FakeModel([REPLY], batch_size=128)
        with Runtime.open(model, memory="8GiB", speculate=speculate) as runtime:
            for seed in range(first_seed, first_seed + 1500, 50):
                options = [
                    SamplingParams(max_tokens=3, seed=seed + i, **SAMPLING) for i in range(50)
                ]
                results = runtime.generate_batch([PROMPT] * 50, options)
                counts.update(map(third_of, results))
                stats_of = [result.stats.speculation for result in results]
                accepted += sum(stats["accepted"] for stats in stats_of if stats is not None)
        assert (accepted > 0) == (speculate != "off")
        return counts

    require_one_distribution(
        third_tokens_of_batches("auto", 0), third_tokens_of_batches("off", 1500)
    )
