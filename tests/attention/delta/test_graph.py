"""Delta in llama.cpp's graph, on the default model: the same laws for all granularities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_text import sample_text

from lowtide import Runtime
from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import Dense, DenseController
from lowtide.attention.evaluation.divergence import Distance, Reference
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.plan.estimates import attention_bytes
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions

TEXT = sample_text()
LENGTH, CONTEXT = 400, 768
TOKENS = Delta(sparsity=0.5, window=96)
BLOCKS = Delta(granularity="block", sparsity=0.5, window=96)
GRANULARITIES = pytest.mark.parametrize(
    "half",
    [
        TOKENS,
        BLOCKS,
    ],
    ids=lambda policy: policy.granularity,
)


class Bench:
    """The default model under a hook, and the tokens of a text."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.spec = read_spec(path)
        self.hook = LlamaHook(threads=threads)
        options = LoadOptions(
            context=CONTEXT, batch_size=128, threads=threads, eval_callback=self.hook.callback
        )
        self.model = GgufModel(self.spec, options)
        self.token_ids = self.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)

    def start(self, policy: AttentionPolicy) -> None:
        """Attend as a policy does, in prompts and decoding alike."""
        policy.resolve(self.spec).configure(self.hook, self.spec).begin_prefill()

    def read(self, batches: Sequence[int], token_ids: Sequence[int] | None = None) -> bytes:
        """Append so many tokens in each pass; return the logits of the last one."""
        token_ids, logits = token_ids or self.token_ids, b""
        for num_tokens in batches:
            at = self.model.num_tokens
            logits = self.model.forward(token_ids[at : at + num_tokens]).tobytes()
        return logits

    def distance(self, policy: AttentionPolicy) -> tuple[Distance, float, ScoreCost]:
        """Return the distance from dense attention, the share of keys read, and the cost of scores."""
        reference = Reference(self.model, DenseController(self.hook), self.token_ids, LENGTH, 16)
        before = self.hook.counts()
        found = reference.distance(policy.resolve(self.spec).configure(self.hook, self.spec))
        after = self.hook.counts()
        share = (after.keys_read - before.keys_read) / (after.keys_visible - before.keys_visible)
        return found, share, after.scores - before.scores

    def close(self) -> None:
        self.model.close()
        self.hook.close()


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    made = Bench(smollm2)
    yield made
    made.close()


def test_groups_stay_close_to_dense_and_read_less(bench: Bench) -> None:
    policies = (
        Delta(sparsity=0.1),
        Delta(sparsity=0.8, window=1),
        Delta(sparsity=0.8, window=2048),
    )
    (few, all_read), (many, less_read), (none, exact_read) = (
        bench.distance(policy)[:2] for policy in policies
    )
    assert few.kl <= 0.02 < many.kl  # one exact key, the query's own, is too few
    # A window over the whole context is dense attention in another order of summation.
    assert none.kl <= 0.006
    assert less_read < 0.7 < all_read < 1 == exact_read


@pytest.mark.parametrize(
    "policy",
    [
        Delta(granularity="block", refine=0),
        Delta(granularity="block", block=16, refine=0),
        Delta(granularity="element", refine=0),
    ],
    ids=lambda policy: policy.usage,
)
def test_blocks_stay_close_to_dense_and_skip_multiplications(bench: Bench, policy: Delta) -> None:
    found, costs = [], []
    for changes in (
        {"threshold": 0.0},
        {"sparsity": 0.2},
        {"threshold": 5.0, "window": 1},
        {"window": 2048},
    ):
        distance, _, cost = bench.distance(replace(policy, **changes))  # type: ignore[arg-type]
        found.append(distance)
        costs.append(cost)
    nothing, few, many, none = found
    # Dense attention in another order of summation: nothing is merged, or nothing is behind the window.
    assert nothing.kl <= 0.006 and none.kl <= 0.006
    assert few.kl <= 0.02 < many.kl
    assert costs[3].channels_merged == 0 and costs[3].skipped == 0
    assert 0 <= costs[0].skipped <= costs[0].sparsity <= 0.01  # some channels are equal
    assert 0.19 <= costs[1].sparsity <= 0.22 < 0.88 <= costs[2].sparsity
    for cost in costs[1:3]:
        assert 0 < cost.skipped < cost.sparsity
        bytes_skipped = cost.key_bytes_total - cost.key_bytes_read
        assert bytes_skipped < cost.skipped * cost.key_bytes_total
        # If only few single channels are merged, the indices take more than the merged channels.
        few_elements = policy.granularity == "element" and cost is costs[1]
        assert bytes_skipped > 0 or few_elements


def test_blocks_work_with_a_quantised_cache(smollm2: Path) -> None:
    with Runtime.open(
        smollm2, memory="2GiB", context=CONTEXT, attention=BLOCKS, kv_type="q8_0", threads=1
    ) as runtime:
        done = runtime.generate(TEXT[:1200], max_tokens=4, temperature=0)
    assert done.stats.layers_native == done.stats.layers
    assert done.stats.scores is not None and 0.4 < done.stats.scores["sparsity"] <= 0.5


@GRANULARITIES
def test_truncation_and_other_batches_change_nothing(bench: Bench, half: Delta) -> None:
    bench.model.truncate(0)
    bench.start(half)
    expected = bench.read((128, 128, 128, 16))
    bench.read((64, 1, 1))
    bench.model.truncate(250)
    assert bench.read((50, 80, 1, 19)) == expected
    bench.model.truncate(0)
    bench.read((128, 100), bench.token_ids[300:])
    bench.model.truncate(0)
    assert bench.read((100, 100, 100, 99, 1)) == expected


@GRANULARITIES
def test_tokens_read_by_dense_attention_replace_the_merged_ones(bench: Bench, half: Delta) -> None:
    def mixed() -> bytes:
        bench.start(Dense())
        bench.model.truncate(0)
        bench.read((128, 128, 44))
        bench.start(half)
        return bench.read((60, 1))

    expected = mixed()
    bench.model.truncate(0)
    bench.read((128, 128, 128), bench.token_ids[300:])
    assert mixed() == expected


def test_policies_that_follow_one_another_do_not_mix(bench: Bench) -> None:
    logits = []
    for policy in (BLOCKS, TOKENS, Dense(), BLOCKS, TOKENS, Dense()):
        bench.model.truncate(0)
        bench.start(policy)
        logits.append(bench.read((128, 128, 100)))
    assert logits[:3] == logits[3:]
    assert len(set(logits)) == 3


@pytest.mark.parametrize(
    "policy",
    [
        Delta(sparsity=0.25),
        Delta(sparsity=0.25, window=9999),
        Delta(granularity="block", sparsity=0.5),
        Delta(granularity="block", threshold=0),
        Delta(granularity="block", block=16, threshold=0),
        Delta(granularity="element", sparsity=0.5),
        Delta(granularity="element", threshold=0),
    ],
    ids=repr,
)
def test_scratch_stays_inside_the_plan(policy: Delta, smollm2: Path) -> None:
    bench = Bench(smollm2)
    policy = policy.resolve(bench.spec)
    try:
        policy.configure(bench.hook, bench.spec).begin_prefill()
        bench.read((128,) * 4)
        held = bench.hook.counts().scratch_bytes
    finally:
        bench.close()
    # Refining, which decoding needs, has scores of its own.
    planned = attention_bytes(bench.spec, CONTEXT, 1)
    planned += replace(policy, refine=0).memory.scratch_bytes(bench.spec, CONTEXT, 1)
    assert 0.4 * planned <= held <= planned


@pytest.mark.parametrize(
    ("policy", "name", "read"),
    [
        (TOKENS, "delta, sparsity 50%, window 96", 0.9),
        pytest.param(BLOCKS, "delta, blocks of 8, sparsity 50%, window 96", 1),
    ],
    ids=["token", "block"],
)
def test_a_restored_prompt_is_merged_again(
    policy: Delta, name: str, read: float, smollm2: Path
) -> None:
    """A snapshot restores slots that no pass has written: what was merged of others is not theirs."""
    with Runtime.open(
        smollm2,
        memory="2GiB",
        context=CONTEXT,
        attention=policy,
        prefix_cache="64MiB",
        threads=1,
    ) as runtime:
        first = runtime.generate(TEXT[:1000], max_tokens=4, temperature=0)
        runtime.generate(TEXT[1000:2000], max_tokens=4, temperature=0)
        back = runtime.generate(TEXT[:1000], max_tokens=4, temperature=0)
    assert back.token_ids == first.token_ids
    assert back.stats.restored_tokens > 200
    assert first.stats.attention.startswith(name)
    assert first.stats.attended_share is not None and first.stats.attended_share <= read
    scores = first.stats.scores
    if policy is BLOCKS:
        assert scores is not None and 0.45 <= scores["sparsity"] <= 0.5
        assert 0.1 < scores["skipped"] < scores["sparsity"]
        assert scores["key_bytes_read"] < 0.9 * scores["key_bytes_total"]


@GRANULARITIES
def test_threads_change_nothing(half: Delta, smollm2: Path) -> None:
    logits = set()
    for threads in (1, 2):
        made = Bench(smollm2, threads)
        try:
            made.start(half)
            logits.add(made.read((128, 64, 1)))
        finally:
            made.close()
    assert len(logits) == 1


def read_dense(bench: Bench) -> bytes:
    bench.start(Dense())
    bench.model.truncate(0)
    return bench.read((128, 128, 128))


def test_measuring_groups_leaves_attention_dense(bench: Bench) -> None:
    expected = read_dense(bench)
    bench.start(TOKENS)
    bench.hook.measure_groups()
    bench.model.truncate(0)
    assert bench.read((128, 128, 128)) == expected
    errors, squares = bench.hook.group_measures(30, 3, 64)
    assert (errors > 0).all() and errors.max() < 2
    assert (squares.sum(axis=2) > 0).all()
    assert np.isfinite(squares).all()
    bench.start(Dense())


def test_measuring_blocks_leaves_attention_dense(bench: Bench) -> None:
    expected = read_dense(bench)
    bench.start(BLOCKS)
    bench.hook.blocks.measure()
    bench.model.truncate(0)
    assert bench.read((128, 128, 128)) == expected
    errors, shares, squares = bench.hook.blocks.measures(30, 3, 64)
    assert (errors > 0).all() and errors.max() < 2
    assert (shares > 0.4).all() and (shares <= 0.54).all()  # the sinks are stored whole
    assert (squares.sum(axis=2) > 0).all()
    assert np.isfinite(squares).all()
    bench.start(Dense())
