"""Two prompts of 3,000 tokens in turn: the first token of each, with the prefix cache and without.

Run with `make bench`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paired import paired

from lowtide import GenerationResult, Runtime

pytestmark = pytest.mark.benchmark
LENGTH = 3000
TEXTS = (
    "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. ",
    "A ship that was made of wood lay on the sand, and the children climbed all over it. ",
)


def switching(runtime: Runtime, results: list[GenerationResult]) -> Callable[[], None]:
    """Return what asks the two prompts in turn; each was read once before."""
    tokenizer = runtime._model.tokenizer
    prompts = []
    for text in TEXTS:
        token_ids = tokenizer.encode(text * 400, add_special=False, parse_special=False)
        prompts.append(tokenizer.decode(token_ids[:LENGTH]))
    turns = itertools.cycle(prompts)

    def ask() -> None:
        results.append(runtime.generate(next(turns), max_tokens=1, temperature=0))

    for _ in prompts:
        ask()
    results.clear()
    return ask


def test_alternating_prompts(benchmark: Any, smollm2: Path) -> None:
    options = {"memory": "4GiB", "context": 3072, "threads": 2}
    ours: list[GenerationResult] = []
    theirs: list[GenerationResult] = []
    with (
        Runtime.open(smollm2, **options, prefix_cache="192MiB") as kept,  # type: ignore[arg-type]
        Runtime.open(smollm2, **options) as plain,  # type: ignore[arg-type]
    ):
        paired(
            benchmark,
            f"going back to a prompt of {LENGTH} tokens, first token",
            switching(kept, ours),
            switching(plain, theirs),
            rounds=3,
            peer="reading it again",
        )
    for restored, again in zip(ours, theirs, strict=True):
        assert restored.token_ids == again.token_ids
        assert abs(restored.stats.prompt_tokens - LENGTH) < 10
        assert restored.stats.restored_tokens == restored.stats.prompt_tokens - 1
        assert again.stats.restored_tokens == 0 and again.stats.reused_tokens < 10
