"""TidalDecode as a value, and in llama.cpp's graph on a real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_text import sample_text

from lowtide import Runtime
from lowtide.attention.bindings.library import cpu_features
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.dense import Dense, DenseController
from lowtide.attention.evaluation.divergence import Reference
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal.policy import Tidal, TidalMemory, default_selection_layers
from lowtide.memory.plan.estimates import attention_bytes
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.spec import ModelSpec

TEXT = sample_text()
LAYERS = (2, 8, 14, 20)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(30, (2, 8, 14, 20)), (16, (2, 8)), (32, (2, 8, 14, 20)), (8, (2,)), (2, (1,)), (1, (0,))],
)
def test_the_default_layers_depend_on_the_depth(
    layers: int, expected: tuple[int, ...], smollm2_spec: ModelSpec
) -> None:
    assert default_selection_layers(replace(smollm2_spec, num_layers=layers)) == expected


def test_without_a_calibration_sliding_windows_stay_dense(smollm2_spec: ModelSpec) -> None:
    spec = replace(smollm2_spec, sliding_window=512, fingerprint="0" * 32)
    fitted = Tidal().resolve(spec)
    assert fitted.selection_layers == tuple(range(30))
    assert "not calibrated" in str(fitted)


def test_roles() -> None:
    assert list(Tidal(selection_layers=(2, 5)).roles(8)) == [0, 0, 1, 2, 2, 1, 2, 2]
    assert list(Tidal(selection_layers=(1,), dense_layers=3).roles(5)) == [0, 1, 0, 2, 2]
    assert list(Tidal(selection_layers=(4,), dense_layers=0).roles(6)) == [0, 0, 0, 0, 1, 2]


class Bench:
    """The default model with a prompt of 1,400 tokens and the dense distributions after it."""

    def __init__(self, path: Path) -> None:
        self.spec = read_spec(path)
        self.hook = LlamaHook(threads=1)
        options = LoadOptions(
            context=2048, batch_size=128, threads=1, eval_callback=self.hook.callback
        )
        self.model = GgufModel(self.spec, options)
        self.token_ids = self.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
        self.dense = DenseController(self.hook)
        self.place = Reference(self.model, self.dense, self.token_ids, 1400, 32)

    def controller(self, policy: AttentionPolicy) -> Any:
        return policy.resolve(self.spec).configure(self.hook, self.spec)

    def logits(self, policy: AttentionPolicy, batches: tuple[int, ...]) -> list[bytes]:
        """The last row's logits of each pass after the prompt."""
        self.place.distance(Dense().configure(self.hook, self.spec))  # the prompt alone is left
        controller, at, found = self.controller(policy), 1400, []
        for rows in batches:
            controller.begin_decode()
            found.append(self.model.forward(self.token_ids[at : at + rows]).tobytes())
            at += rows
        return found

    def share(self, policy: AttentionPolicy, tokens: int = 8) -> float:
        before = self.hook.counts()
        self.logits(policy, (1,) * tokens)
        after = self.hook.counts()
        prompt = 30 * sum(range(1401, 1401 + len(self.place._dense)))  # the reference's passes
        held = after.keys_visible - before.keys_visible - prompt
        return (after.keys_read - before.keys_read - prompt) / held


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    made = Bench(smollm2)
    yield made
    made.model.close()
    made.hook.close()


def test_k_beyond_the_context_is_dense_bit_for_bit(bench: Bench) -> None:
    dense = bench.logits(Dense(), (1,) * 6)
    assert bench.logits(Tidal(k=2048, selection_layers=LAYERS), (1,) * 6) == dense
    assert bench.logits(Tidal(k=512, min_context=2048, selection_layers=LAYERS), (1,) * 6) == dense
    every = tuple(range(30))
    assert bench.logits(Tidal(k=512, selection_layers=every), (1,) * 6) == dense
    assert bench.logits(Tidal(k=512, selection_layers=LAYERS), (1,) * 6) != dense


def test_attention_stays_close_to_dense_and_reads_less(bench: Bench) -> None:
    wide = bench.place.distance(bench.controller(Tidal(k=700, selection_layers=LAYERS)))
    narrow = bench.place.distance(bench.controller(Tidal(k=100, selection_layers=LAYERS)))
    assert 0 < wide.kl <= 0.02 < narrow.kl
    assert wide.top1_agreement >= 0.75
    assert bench.place.distance(bench.dense).kl == 0
    assert bench.share(Dense()) == 1
    assert (
        0.25
        < bench.share(Tidal(k=100, selection_layers=LAYERS))
        < bench.share(Tidal(k=700, selection_layers=LAYERS))
        < 0.6
    )


@pytest.mark.skipif("avx512_bf16" not in cpu_features(), reason="no avx512_bf16 here")
def test_a_prompt_in_bfloat16_is_read_again_and_stays_close(bench: Bench) -> None:
    use_bf16 = bench.place.distance(bench.controller(Dense(prompts="bf16")))
    both = bench.place.distance(
        bench.controller(Tidal(k=700, prompts="bf16", selection_layers=LAYERS))
    )
    assert 0 < use_bf16.kl <= 0.02
    assert 0 < both.kl <= 0.04
    assert bench.place.distance(bench.dense).kl == 0


def test_a_fraction_is_of_the_context(bench: Bench) -> None:
    share = bench.share(Tidal(k=0.25, selection_layers=LAYERS))
    assert share == pytest.approx(6 / 30 + 24 / 30 * 0.25, abs=0.005)


def test_refreshing_less_often_reads_less_and_the_first_token_is_the_same(bench: Bench) -> None:
    every, fourth = (
        Tidal(k=700, selection_layers=LAYERS),
        Tidal(k=700, selection_layers=LAYERS, refresh=4),
    )
    assert bench.share(fourth) < bench.share(every)
    assert bench.logits(fourth, (1,)) == bench.logits(every, (1,))
    distance = bench.place.distance(bench.controller(fourth))
    assert distance.kl <= 0.08


def test_the_tokens_of_one_pass_share_a_set(bench: Bench) -> None:
    """A pass of many tokens is of a prompt, and dense; one of a few tokens verifies drafts, and is sparse."""
    policy = Tidal(k=300, selection_layers=LAYERS)
    assert bench.logits(policy, (4,)) != bench.logits(Dense(), (4,))
    assert bench.logits(policy, (33,)) == bench.logits(Dense(), (33,))


def test_a_prompt_is_exact_under_every_policy(bench: Bench) -> None:
    def last_logits(policy: AttentionPolicy) -> bytes:
        controller = bench.controller(policy)
        bench.model.truncate(0)
        for at in range(0, 900, 100):
            controller.begin_prefill()
            logits = bench.model.forward(bench.token_ids[at : at + 100])
        return logits.tobytes()

    assert last_logits(Tidal(k=100, selection_layers=LAYERS)) == last_logits(Dense())
    bench.model.truncate(0)


def test_threads_change_nothing(smollm2: Path) -> None:
    seen = set()
    for threads in (1, 2, 3):
        with Runtime.open(
            smollm2,
            memory="8GiB",
            context=1536,
            threads=threads,
            attention=Tidal(k=200, selection_layers=LAYERS),
        ) as runtime:
            result = runtime.generate(TEXT[:3000], max_tokens=12, temperature=0)
            seen.add(result.token_ids)
            assert result.stats.attended_share is not None and result.stats.attended_share < 0.6
            assert result.stats.attention.startswith("tidal, k 200, selection layers 2+8+14+20")
            rows = {row.component: row.num_bytes for row in runtime.plan.rows}
            counts = runtime._engine.kernel_counts()
            assert counts is not None and 0 < counts.scratch_bytes <= rows["attention scratch"]
    assert len(seen) == 1


def test_correction_makes_the_cache_exact_again(smollm2: Path) -> None:
    """With a correction after every token only the attention of the newest token is sparse."""
    answers = {}
    for attention in (
        Dense(),
        Tidal(k=80, selection_layers=LAYERS, correction=1),
        Tidal(k=80, selection_layers=LAYERS),
    ):
        with Runtime.open(smollm2, memory="8GiB", context=1536, attention=attention) as runtime:
            result = runtime.generate(TEXT[1500:4500], max_tokens=12, temperature=0)
            answers[attention] = result.token_ids
    dense, corrected, plain = answers.values()
    assert dense == corrected != plain


def test_the_scratch_stays_inside_the_plan(bench: Bench) -> None:
    controller = bench.controller(Tidal(k=300, selection_layers=LAYERS))
    bench.place.distance(bench.dense)
    for rows in (1, 4, 32):
        controller.begin_decode()
        bench.model.truncate(1400)
        bench.model.forward(bench.token_ids[1400 : 1400 + rows])
    planned = attention_bytes(bench.spec, 2048, 2)
    planned += TidalMemory(selection_layers=4).scratch_bytes(bench.spec, 2048, 2)
    assert bench.hook.counts().scratch_bytes <= planned


def test_two_policies_in_two_runtimes_do_not_disturb_each_other(smollm2: Path) -> None:
    def answer(attention: AttentionPolicy, other: AttentionPolicy | None = None) -> Any:
        with Runtime.open(smollm2, memory="8GiB", context=1024, attention=attention) as runtime:
            if other is None:
                return runtime.generate(TEXT[:2000], max_tokens=8, temperature=0).token_ids
            with Runtime.open(smollm2, memory="8GiB", context=1024, attention=other) as second:
                pairs = zip(
                    runtime.stream(TEXT[:2000], max_tokens=8, temperature=0),
                    second.stream(TEXT[:2000], max_tokens=8, temperature=0),
                    strict=True,
                )
                return tuple(piece.token_id for piece, _ in pairs)

    sparse, dense = Tidal(k=80, selection_layers=LAYERS), Dense()
    assert answer(sparse, dense) == answer(sparse)
    assert answer(dense, sparse) == answer(dense)


def test_the_reference_distance_is_plain_arithmetic() -> None:
    from lowtide.attention.evaluation.divergence import Distance, log_softmax

    logits = np.array([0.0, 1.0, -2.0], np.float32)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(np.exp(log_softmax(logits)), expected, rtol=1e-6)
    both = Distance(num_tokens=2, kl_sum=0.2, dense_nll_sum=4, nll_sum=5, num_agreeing=1)
    total = both + both
    assert (total.kl, total.nll_change, total.top1_agreement) == (0.1, 0.25, 0.5)
