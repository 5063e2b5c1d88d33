"""Answers that run together: throughput, the pause that a long prompt causes, and attention over a shared prefix.

Run with `make bench`. Ten different prompts of 100 to 300 tokens are answered with 128 tokens each, submitted together
and one after the other. Answers are greedy and must be equal. LOWTIDE_THREADS is the number of threads.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from essays import essays
from paired import paired

from lowtide import Runtime
from lowtide.models.model import SequenceSlice

pytestmark = pytest.mark.benchmark
ROUNDS = int(os.environ.get("LOWTIDE_ROUNDS", "5"))
THREADS = int(os.environ.get("LOWTIDE_THREADS", "2"))
OPTIONS: dict[str, Any] = {
    "memory": "4GiB",
    "threads": THREADS,
    "attention": "dense",
    "repack": True,
}


def prompts_of(runtime: Runtime, count: int, seed: int) -> list[str]:
    """Return parts of essays, 100 to 300 tokens each, none of which begins like another."""
    tokenizer, chance = runtime._model.tokenizer, random.Random(seed)
    token_ids = tokenizer.encode(essays(), add_special=False, parse_special=False)
    lengths = [chance.randrange(100, 300) for _ in range(count)]
    starts = [chance.randrange(len(token_ids) - length) for length in lengths]
    return [
        tokenizer.decode(token_ids[start : start + length])
        for start, length in zip(starts, lengths, strict=True)
    ]


def test_ten_answers_together(benchmark: Any, smollm2: Path) -> None:
    params: dict[str, Any] = {"max_tokens": 128, "temperature": 0}
    with (
        Runtime.open(smollm2, context=2048, **OPTIONS) as alone,
        Runtime.open(smollm2, context=2048, sequences=10, **OPTIONS) as together,
    ):
        found: list[list[tuple[int, ...]]] = []
        expected: list[list[tuple[int, ...]]] = []
        seeds, peer_seeds = itertools.count(), itertools.count()

        def submit_all() -> None:
            prompts = prompts_of(together, 10, next(seeds))
            submitted = [together.submit(prompt, **params) for prompt in prompts]
            found.append([one.result().token_ids for one in submitted])

        def one_by_one() -> None:
            prompts = prompts_of(alone, 10, next(peer_seeds))
            expected.append([alone.generate(prompt, **params).token_ids for prompt in prompts])

        paired(
            benchmark,
            "ten answers of 128 tokens to different prompts",
            submit_all,
            one_by_one,
            rounds=ROUNDS,
            peer="one after the other",
        )
        assert together.submit("a", max_tokens=1).result().stats.batch["identical"]  # type: ignore[index]
    assert found == expected


def test_a_long_prompt_does_not_hold_others_up(benchmark: Any, smollm2: Path) -> None:
    """A prompt of 7,000 tokens beside an answer that runs, and a short question that comes meanwhile."""
    with Runtime.open(smollm2, context=8192, sequences=4, **OPTIONS) as runtime:
        tokenizer = runtime._model.tokenizer
        token_ids = tokenizer.encode(essays() * 3, add_special=False, parse_special=False)
        pauses: list[float] = []
        first_tokens: list[float] = []

        def answer_beside() -> None:
            at = random.randrange(5000)
            runs = runtime.submit("Once upon a time", max_tokens=400, temperature=0.9)
            times = [time.perf_counter() for _, _ in zip(runs, range(20), strict=False)]
            long = runtime.submit(tokenizer.decode(token_ids[at : at + 7000]), max_tokens=2)
            time.sleep(0.3)
            asked_at = time.perf_counter()
            next(iter(runtime.submit([{"role": "user", "content": "Hi"}], max_tokens=2)))
            first_tokens.append(time.perf_counter() - asked_at)
            for _, chunk in zip(range(60), itertools.islice(runs, 20, None), strict=False):
                times.append(time.perf_counter())
                assert chunk is not None
            is_reading = not long.done
            runs.cancel()
            long.result()
            assert is_reading
            pauses.append(max(b - a for a, b in itertools.pairwise(times[21:])))

        benchmark.pedantic(answer_beside, rounds=2)
    print(
        f"\nfirst token of a short chat after {max(first_tokens):.2f} s at most, "
        f"longest pause between two tokens {max(pauses):.2f} s"
    )


def test_attention_over_a_shared_prefix(benchmark: Any, smollm2: Path) -> None:
    """Eight sequences of 4,000 common tokens, in shared slots and in slots of their own."""
    count, length, passes = 8, 4000, 10
    with Runtime.open(smollm2, context=8192, **OPTIONS) as runtime:
        model, hook = runtime._model, runtime._engine.hook
        assert hook is not None
        chance = random.Random(1)
        prefix = [chance.randrange(1000, 40000) for _ in range(length)]
        attention_s: dict[str, list[float]] = {"shared": [], "separate": []}

        def decode(name: str) -> None:
            sequences = model.open_sequences(
                count, (length + 64) * (1 if name == "shared" else count) + 512
            )
            try:
                for i in range(1 if name == "shared" else count):
                    for start in range(0, length, model.batch_size):
                        part = prefix[start : start + model.batch_size]
                        sequences.forward([SequenceSlice(i, part, num_logits=0)])
                for i in range(1, count if name == "shared" else 1):
                    sequences.copy_prefix(0, i, length)
                runtime._engine.controller.begin_decode()
                for step in range(passes):
                    before = hook.counts().seconds
                    sequences.forward([SequenceSlice(i, [100 + i + step]) for i in range(count)])
                    attention_s[name].append(hook.counts().seconds - before)
            finally:
                sequences.close()

        def both() -> None:
            decode("shared")
            decode("separate")

        benchmark.pedantic(both, rounds=1)
    shared, separate = (statistics.median(attention_s[name]) for name in ("shared", "separate"))
    print(
        f"\nattention of a pass over {count} sequences of {length:,} common tokens: shared {shared * 1000:.1f} ms, "
        f"separate {separate * 1000:.1f} ms, {shared / separate:.3f} of it"
    )
