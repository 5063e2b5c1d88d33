"""Eight prompts with a common prefix of 1,000 tokens: as a batch, and one after another, end to end.

Run with `make bench`. Later prompts either reuse the prefix in the KV cache or compute it again; both are
timed, with lowtide's attention and with repacked weights. Answers are greedy and must be equal. Then eight
prompts whose answers copy from them, in a batch with and without speculation. LOWTIDE_PROMPTS names a file
of prompts, one JSON object per line with `category` and `turns` (the format of Spec-Bench), of which those
of LOWTIDE_KIND (default: summarization) are used; without it, prompts are made here. LOWTIDE_THREADS is the
number of threads.
"""

from __future__ import annotations

import json
import os
import statistics
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
THREADS = int(os.environ.get("LOWTIDE_THREADS", "2"))
PARAGRAPH = (
    "The harbour lies behind a long wall of grey stone. At low tide the boats rest on the mud, and the "
    "children walk between them with buckets. At high tide the ferry comes in, and the bell on the quay is "
    "rung three times. Nobody remembers who hung the bell there."
)
PLACES = ("harbour", "village", "market", "station", "school", "museum", "garden", "theatre")
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
    """Return the first tokens of an essay, followed by a different question each."""
    tokenizer = runtime._model.tokenizer
    token_ids = tokenizer.encode(essays(), add_special=False, parse_special=False)
    shared = tokenizer.decode(token_ids[:LENGTH])
    return [f"{shared}\n\n{question}\n" for question in QUESTIONS]


def one_after_another(
    runtime: Runtime, prompts: list[str], results: list[list[GenerationResult]], *, anew: bool
) -> Callable[[], None]:
    """Return a function that answers each prompt alone; with `anew`, without a common prefix in the cache."""

    def ask() -> None:
        runtime._session.clear()
        answers = []
        for prompt in prompts:
            if anew:
                runtime._session.clear()
            answers.append(runtime.generate(prompt, max_tokens=MAX_TOKENS, temperature=0))
        results.append(answers)

    return ask


@pytest.mark.parametrize("anew", [False, True], ids=["in one cache", "each anew"])
@pytest.mark.parametrize("repack", [False, True], ids=["dense", "repacked"])
def test_batch_of_eight(benchmark: Any, smollm2: Path, *, repack: bool, anew: bool) -> None:
    options: dict[str, Any] = {"memory": "4GiB", "context": 2048, "threads": 2}
    with Runtime.open(smollm2, **options, attention="dense", repack=repack) as runtime:
        prompts = prompts_of(runtime)
        alone: list[list[GenerationResult]] = []
        together: list[list[GenerationResult]] = []
        paired(
            benchmark,
            f"batch of {len(prompts)} prompts of {LENGTH} tokens, {MAX_TOKENS} new tokens",
            lambda: together.append(
                runtime.generate_batch(prompts, max_tokens=MAX_TOKENS, temperature=0)
            ),
            one_after_another(runtime, prompts, alone, anew=anew),
            rounds=ROUNDS,
            peer=f"one after another, {'each anew' if anew else 'in one cache'}",
        )
    for one, other in zip(alone, together, strict=True):
        assert [r.token_ids for r in one] == [r.token_ids for r in other]
    batch = together[0][0].stats.batch
    assert batch is not None and batch["identical"]
    assert abs(together[0][1].stats.reused_tokens - LENGTH) < 10


def copying_prompts() -> list[str]:
    """Return eight prompts whose answers copy from them, from a file or with texts to repeat."""
    path = os.environ.get("LOWTIDE_PROMPTS")
    if path is None:
        texts = [PARAGRAPH.replace("harbour", place) for place in PLACES]
        return [f"{text}\n\nThe same text once more:\n\n{text[:40]}" for text in texts]
    kind = os.environ.get("LOWTIDE_KIND", "summarization")
    entries = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    prompts = [entry["turns"][0] for entry in entries if entry["category"] == kind][:8]
    if not prompts:
        pytest.skip(f"{path} has no prompts of the kind {kind}")
    return prompts


@pytest.mark.parametrize("repack", [False, True], ids=["dense", "repacked"])
def test_batch_of_eight_with_speculation(benchmark: Any, smollm2: Path, *, repack: bool) -> None:
    options: dict[str, Any] = {"memory": "4GiB", "context": 2048, "threads": THREADS}
    params: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0, "overflow": "drop-oldest"}
    prompts = copying_prompts()
    without: list[list[GenerationResult]] = []
    drafting: list[list[GenerationResult]] = []
    with (
        Runtime.open(smollm2, **options, attention="dense", repack=repack) as plain,
        Runtime.open(
            smollm2, **options, attention="dense", repack=repack, speculate="auto"
        ) as speculating,
    ):
        paired(
            benchmark,
            f"batch of {len(prompts)} copying prompts, {MAX_TOKENS} new tokens, with speculation",
            lambda: drafting.append(speculating.generate_batch(prompts, **params)),
            lambda: without.append(plain.generate_batch(prompts, **params)),
            rounds=ROUNDS,
            peer="the same batch without drafts",
        )
    for one, other in zip(without, drafting, strict=True):
        assert [r.token_ids for r in one] == [r.token_ids for r in other]
    statistics_of = [result.stats.speculation for result in drafting[-1]]
    rounds, drafted, accepted = (
        sum(stats[name] for stats in statistics_of if stats is not None)
        for name in ("rounds", "drafted", "accepted")
    )
    ratios = [decode_s(one) / decode_s(other) for one, other in zip(without, drafting, strict=True)]
    ratio = statistics.median(ratios[1:])
    benchmark.extra_info.update(decode_ratio=ratio, drafted=drafted, accepted=accepted)
    print(
        f"decoding alone: {ratio:.3f} x ({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f}); {accepted} of "
        f"{drafted} drafts accepted in {rounds} rounds"
    )


def decode_s(results: list[GenerationResult]) -> float:
    """Return the seconds from the first token of the first answer to the end of the last answer."""
    return max(result.stats.decode_s for result in results)
