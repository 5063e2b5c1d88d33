"""Two alternating prompts of 3,000 tokens: the time to the first token with and without the prefix cache.

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
    """Return a function that answers the two prompts in turn; both have been read before."""
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
    with_cache: list[GenerationResult] = []
    without: list[GenerationResult] = []
    with (
        Runtime.open(smollm2, **options, prefix_cache="192MiB") as caching,  # type: ignore[arg-type]
        Runtime.open(smollm2, **options) as plain,  # type: ignore[arg-type]
    ):
        paired(
            benchmark,
            f"first token of an earlier prompt of {LENGTH} tokens",
            switching(caching, with_cache),
            switching(plain, without),
            rounds=3,
            peer="computing it again",
        )
    for restored, again in zip(with_cache, without, strict=True):
        assert restored.token_ids == again.token_ids
        assert abs(restored.stats.prompt_tokens - LENGTH) < 10
        assert restored.stats.restored_tokens == restored.stats.prompt_tokens - 1
        assert again.stats.restored_tokens == 0 and again.stats.reused_tokens < 10
