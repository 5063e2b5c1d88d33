"""Delta in llama.cpp's graph, on the default model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from lowtide import Runtime
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Reference
from lowtide.attention.parse import parse_policy
from lowtide.memory.plan.estimates import attention_bytes, group_bytes
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.gguf.spec import read_spec

TEXT = (Path(__file__).resolve().parents[1] / "test_kernels.py").read_text()
LENGTH, CONTEXT = 400, 768
HALF = "delta:sparsity=0.5,window=96"


class Bench:
    """The default model under a hook, and the passes over a text."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.spec = read_spec(path)
        self.hook = LlamaHook(threads=threads)
        callback = self.hook.callback
        options = LoadOptions(
            context=CONTEXT, batch_size=128, threads=threads, eval_callback=callback
        )
        self.model = GgufModel(self.spec, options)
        self.token_ids = self.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)

    def start(self, text: str) -> None:
        """Have passes attend as a policy does, prompts and decoding alike."""
        policy = parse_policy(text).resolve(self.spec)
        policy.install(self.hook, self.spec).begin_prefill()

    def read(self, batches: Sequence[int], token_ids: Sequence[int] | None = None) -> bytes:
        """Append so many tokens in each pass; return the last row's logits."""
        token_ids, logits = token_ids or self.token_ids, b""
        for rows in batches:
            at = self.model.num_tokens
            logits = self.model.forward(token_ids[at : at + rows]).tobytes()
        return logits


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    made = Bench(smollm2)
    yield made
    made.model.close()
    made.hook.close()


def test_it_stays_close_to_dense_and_reads_less(bench: Bench) -> None:
    place = Reference(bench.model, DenseController(bench.hook), bench.token_ids, LENGTH, 16)
    found, shares = [], []
    for text in (
        "delta:sparsity=0.1",
        "delta:sparsity=0.8,window=1",
        "delta:sparsity=0.8,window=2048",
    ):
        before = bench.hook.counts()
        policy = parse_policy(text).resolve(bench.spec)
        found.append(place.distance(policy.install(bench.hook, bench.spec)))
        after = bench.hook.counts()
        read, held = after.keys_read - before.keys_read, after.keys_held - before.keys_held
        shares.append(read / held)
    few, many, none = found
    assert few.kl <= 0.02 < many.kl  # one key as it is, the row's own, is too few
    # A window over the whole context is dense attention in another order of summation.
    assert none.kl <= 0.006
    assert shares[1] < 0.7 < shares[0] < 1 == shares[2]


def test_rewinding_and_other_batches_change_nothing(bench: Bench) -> None:
    bench.model.truncate(0)
    bench.start(HALF)
    expected = bench.read((128, 128, 128, 16))
    bench.read((64, 1, 1))
    bench.model.truncate(250)
    assert bench.read((50, 80, 1, 19)) == expected
    bench.model.truncate(0)
    bench.read((128, 100), bench.token_ids[300:])
    bench.model.truncate(0)
    assert bench.read((100, 100, 100, 99, 1)) == expected


def test_dense_passes_between_are_noticed(bench: Bench) -> None:
    """Rows that dense attention put into the cache stand for those that were grouped there before."""

    def mixed() -> bytes:
        bench.start("dense")
        bench.model.truncate(0)
        bench.read((128, 128, 44))
        bench.start(HALF)
        return bench.read((60, 1))

    expected = mixed()
    bench.model.truncate(0)
    bench.read((128, 128, 128), bench.token_ids[300:])
    assert mixed() == expected


@pytest.mark.parametrize("text", ["delta:sparsity=0.25", "delta:sparsity=0.25,window=9999"])
def test_the_groups_stay_inside_their_row(text: str, smollm2: Path) -> None:
    bench = Bench(smollm2)
    policy = parse_policy(text).resolve(bench.spec)
    try:
        policy.install(bench.hook, bench.spec).begin_prefill()
        bench.read((128,) * 4)
        held = bench.hook.counts().scratch_bytes
    finally:
        bench.model.close()
        bench.hook.close()
    groups = policy.key_groups
    assert groups is not None
    planned = attention_bytes(bench.spec, CONTEXT, 1) + group_bytes(bench.spec, groups, CONTEXT, 1)
    assert 0.4 * planned <= held <= planned


def test_a_prompt_that_comes_back_is_grouped_anew(smollm2: Path) -> None:
    """States put cells back that no pass has written: what was grouped of others is not theirs."""
    with Runtime.open(
        smollm2,
        memory="2GiB",
        context=CONTEXT,
        attention=HALF,
        prefix_cache="64MiB",
        threads=1,
    ) as runtime:
        first = runtime.generate(TEXT[:1000], max_tokens=4, temperature=0)
        runtime.generate(TEXT[1000:2000], max_tokens=4, temperature=0)
        back = runtime.generate(TEXT[:1000], max_tokens=4, temperature=0)
        assert back.token_ids == first.token_ids
        assert back.stats.restored_tokens > 200
        assert first.stats.attention.startswith("delta, sparsity 50%, window 96")
        assert first.stats.attended_share is not None and first.stats.attended_share < 0.9


def test_threads_change_nothing(smollm2: Path) -> None:
    logits = set()
    for threads in (1, 2):
        made = Bench(smollm2, threads)
        try:
            made.start(HALF)
            logits.add(made.read((128, 64, 1)))
        finally:
            made.model.close()
            made.hook.close()
    assert len(logits) == 1


def test_measuring_leaves_attention_dense(bench: Bench) -> None:
    bench.start("dense")
    bench.model.truncate(0)
    expected = bench.read((128, 128, 128))
    bench.start(HALF)
    bench.hook.measure_groups()
    bench.model.truncate(0)
    assert bench.read((128, 128, 128)) == expected
    errors, squares = bench.hook.group_measures(30, 3, 64)
    assert (errors > 0).all() and errors.max() < 2
    assert (squares.sum(axis=2) > 0).all()
    assert np.isfinite(squares).all()
    bench.start("dense")
