"""Eight prompts with the same 1,000 tokens before them: together, and one run after another. End to end.

Run with `make bench`. Runs in the same runtime find the 1,000 tokens in the cache; runs that are each their
own read them again. Both are timed, with our own kernels and with packed weights, greedily: the answers are
the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from essays import essays
from paired import paired

from lowtide import GenerationResult, Runtime

pytestmark = pytest.mark.benchmark
LENGTH = 1000
MAX_TOKENS = 64
ROUNDS = int(os.environ.get("LOWTIDE_ROUNDS", "3"))
QUESTIONS = (
    "What is said first?",
    "What is said last?",
    "Who is speaking?",
    "Where is this?",
    "Sum it up in one sentence.",
    "What is it about?",
    "Go on.",
    "What would you call this text?",
)


def prompts_of(runtime: Runtime) -> list[str]:
    """The first tokens of an essay, and a question behind each copy of them."""
    tokenizer = runtime._model.tokenizer
    token_ids = tokenizer.encode(essays(), add_special=False, parse_special=False)
    shared = tokenizer.decode(token_ids[:LENGTH])
    return [f"{shared}\n\n{question}\n" for question in QUESTIONS]


def one_after_another(
    runtime: Runtime, prompts: list[str], results: list[list[GenerationResult]], *, anew: bool
) -> Callable[[], None]:
    """Return what asks each prompt alone; `anew`, each reads all of it."""

    def ask() -> None:
        runtime._session.forget()
        told = []
        for prompt in prompts:
            if anew:
                runtime._session.forget()
            told.append(runtime.generate(prompt, max_tokens=MAX_TOKENS, temperature=0))
        results.append(told)

    return ask


@pytest.mark.parametrize("anew", [False, True], ids=["in one cache", "each anew"])
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_eight_together(benchmark: Any, smollm2: Path, *, pack: bool, anew: bool) -> None:
    options: dict[str, Any] = {"memory": "4GiB", "context": 2048, "threads": 2}
    with Runtime.open(smollm2, **options, attention="dense", pack=pack) as runtime:
        prompts = prompts_of(runtime)
        alone: list[list[GenerationResult]] = []
        together: list[list[GenerationResult]] = []
        paired(
            benchmark,
            f"{len(prompts)} prompts of {LENGTH} tokens and {MAX_TOKENS} new ones, together",
            lambda: together.append(
                runtime.generate_batch(prompts, max_tokens=MAX_TOKENS, temperature=0)
            ),
            one_after_another(runtime, prompts, alone, anew=anew),
            rounds=ROUNDS,
            peer=f"one run after another, {'each anew' if anew else 'in one cache'}",
        )
    for one, other in zip(alone, together, strict=True):
        assert [r.token_ids for r in one] == [r.token_ids for r in other]
    batch = together[0][0].stats.batch
    assert batch is not None and batch["identical"]
    assert abs(batch["shared_tokens"] - LENGTH) < 10
