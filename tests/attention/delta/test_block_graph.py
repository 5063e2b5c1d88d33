"""Delta by blocks in llama.cpp's graph, on the default model."""

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
from lowtide.memory.plan.attention import state_bytes
from lowtide.memory.plan.estimates import attention_bytes
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.gguf.spec import read_spec

pytestmark = pytest.mark.once

TEXT = (Path(__file__).resolve().parents[1] / "test_kernels.py").read_text()
LENGTH, CONTEXT = 400, 768
HALF = "delta:granularity=block,sparsity=0.5,window=96"
KINDS = pytest.mark.parametrize(
    "kind", ["granularity=block", "granularity=block,block=16", "granularity=element"]
)


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

    def close(self) -> None:
        self.model.close()
        self.hook.close()


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    made = Bench(smollm2)
    yield made
    made.close()


@KINDS
def test_it_stays_close_to_dense_and_skips(bench: Bench, kind: str) -> None:
    place = Reference(bench.model, DenseController(bench.hook), bench.token_ids, LENGTH, 16)
    found, costs = [], []
    for settings in ("threshold=0", "sparsity=0.2", "threshold=5,window=1", "window=2048"):
        before = bench.hook.counts()
        policy = parse_policy(f"delta:{kind},{settings},refine=0").resolve(bench.spec)
        found.append(place.distance(policy.install(bench.hook, bench.spec)))
        costs.append(bench.hook.counts().scores - before.scores)
    whole, few, many, none = found
    # Dense attention in another order of summation: where nothing is off, or nothing behind the window.
    assert whole.kl <= 0.006 and none.kl <= 0.006
    assert few.kl <= 0.02 < many.kl
    assert costs[3].channels_behind == 0 and costs[3].skipped == 0
    assert 0 <= costs[0].skipped <= costs[0].sparsity <= 0.01  # where channels are equal
    assert 0.19 <= costs[1].sparsity <= 0.22 < 0.88 <= costs[2].sparsity
    for cost in costs[1:3]:
        assert 0 < cost.skipped < cost.sparsity
        assert cost.key_bytes_skipped < cost.skipped * cost.key_bytes_held
        # Of single channels, of which few are left out, it takes more to say which keys are alike.
        assert cost.key_bytes_skipped > 0 or ("element" in kind and cost is costs[1])


def test_keys_in_the_cache_may_be_of_any_type(smollm2: Path) -> None:
    with Runtime.open(
        smollm2, memory="2GiB", context=CONTEXT, attention=HALF, kv_type="q8_0", threads=1
    ) as runtime:
        done = runtime.generate(TEXT[:1200], max_tokens=4, temperature=0)
    assert done.stats.layers_native == done.stats.layers
    assert done.stats.scores is not None and 0.4 < done.stats.scores["sparsity"] <= 0.5


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
    """Rows that dense attention put into the cache stand for those whose states were kept before."""

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


def test_policies_that_follow_one_another_do_not_mix(bench: Bench) -> None:
    logits = []
    for text in (HALF, "delta:sparsity=0.5", "dense", HALF, "delta:sparsity=0.5", "dense"):
        bench.model.truncate(0)
        bench.start(text)
        logits.append(bench.read((128, 128, 100)))
    assert logits[:3] == logits[3:]
    assert len(set(logits)) == 3


@KINDS
@pytest.mark.parametrize("settings", ["sparsity=0.5", "threshold=0"])
def test_the_states_stay_inside_their_row(kind: str, settings: str, smollm2: Path) -> None:
    bench = Bench(smollm2)
    policy = parse_policy(f"delta:{kind},{settings}").resolve(bench.spec)
    try:
        policy.install(bench.hook, bench.spec).begin_prefill()
        bench.read((128,) * 4)
        held = bench.hook.counts().scratch_bytes
    finally:
        bench.close()
    states = policy.key_states
    assert states is not None
    planned = attention_bytes(bench.spec, CONTEXT, 1) + state_bytes(bench.spec, states, CONTEXT, 1)
    assert 0.4 * planned <= held <= planned


def test_a_prompt_that_comes_back_is_answered_the_same(smollm2: Path) -> None:
    """States put cells back that no pass has written: what was known of others is not theirs."""
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
        assert first.stats.attention.startswith("delta, blocks of 8, sparsity 50%, window 96")
        assert first.stats.attended_share == 1
        scores = first.stats.scores
    assert scores is not None and 0.45 <= scores["sparsity"] <= 0.5
    assert 0.1 < scores["skipped"] < scores["sparsity"]
    assert scores["key_bytes_read"] < 0.9 * scores["key_bytes_held"]


def test_threads_change_nothing(smollm2: Path) -> None:
    logits = set()
    for threads in (1, 2):
        made = Bench(smollm2, threads)
        try:
            made.start(HALF)
            logits.add(made.read((128, 64, 1)))
        finally:
            made.close()
    assert len(logits) == 1


def test_measuring_leaves_attention_dense(bench: Bench) -> None:
    bench.start("dense")
    bench.model.truncate(0)
    expected = bench.read((128, 128, 128))
    bench.start(HALF)
    bench.hook.states.measure()
    bench.model.truncate(0)
    assert bench.read((128, 128, 128)) == expected
    errors, shares, squares = bench.hook.states.measures(30, 3, 64)
    assert (errors > 0).all() and errors.max() < 2
    assert (shares > 0.4).all() and (shares <= 0.54).all()  # with the first keys, which are whole
    assert (squares.sum(axis=2) > 0).all()
    assert np.isfinite(squares).all()
    bench.start("dense")
