"""TidalDecode as a value, and in llama.cpp's graph on a real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide import FakeModel, Runtime
from lowtide.attention.bindings.library import cpu_features
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.dense import Dense, DenseController
from lowtide.attention.evaluation.divergence import Reference
from lowtide.attention.parse import parse_policy
from lowtide.attention.tidal.policy import Tidal, default_selection_layers
from lowtide.memory.plan.estimates import attention_bytes, selection_bytes
from lowtide.models.errors import BadOption
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.gguf.spec import read_spec
from lowtide.models.spec import ModelSpec

TEXT = (Path(__file__).resolve().parent / "test_kernels.py").read_text()
LAYERS = "layers=2+8+14+20"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tidal", Tidal()),
        ("tidal:k=512", Tidal(k=512)),
        ("tidal:k=10%", Tidal(k=0.1)),
        ("tidal:k=300,layers=2+13,refresh=4", Tidal(k=300, selection_layers=(2, 13), refresh=4)),
        ("tidal:sinks=0,recent=16,correction=128", Tidal(sinks=0, recent=16, correction=128)),
    ],
)
def test_policies_by_name(text: str, expected: Tidal) -> None:
    assert parse_policy(text) == expected
    assert parse_policy(expected) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flash", "attention is 'flash', one of llama, delta, dense, gem, tidal is wanted"),
        ("llama:k=5", "llama has no setting 'k', it has none"),
        ("dense:k=5", "dense has no setting 'k', it has prompts"),
        ("tidal:keys=5", "no setting 'keys', it has k, layers"),
        ("tidal:k=0", "tidal's k is 0: a number of tokens above 68"),
        ("tidal:k=-5", "tidal's k is -5"),
        ("tidal:k=68", "68 tokens are always kept"),
        ("tidal:k=many", "tidal's k is 'many', tokens or a percentage is wanted"),
        ("tidal:k=0%", "tidal's k is '0%'"),
        ("tidal:k=120%", "tidal's k is '120%'"),
        ("tidal:layers=2,13", "no setting '13'"),
        ("tidal:layers=two", "tidal's layers is 'two', layer numbers joined by \\+"),
        ("tidal:recent=0", "recent is 0, 1 or more"),
        ("tidal:sinks=-1", "sinks is -1, 0 or more"),
        ("tidal:refresh=0", "refresh is 0, 1 or more"),
        ("tidal:refresh=65", "refresh is 65 and recent 64"),
        ("tidal:correction=-1", "correction is -1"),
    ],
)
def test_wrong_policies_name_the_field(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("30", "name layer 30; .* has layers 0 to 29"),
        ("8+2", "are 8\\+2: each once, in order"),
        ("2+2", "each once, in order"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_loading(
    layers: str, message: str, smollm2: Path
) -> None:
    with pytest.raises(BadOption, match=message):
        Runtime.open(smollm2, memory="8GiB", context=512, attention=f"tidal:layers={layers}")


def test_a_model_of_ones_own_has_no_graph_to_hook() -> None:
    with pytest.raises(BadOption, match="'tidal', which runs in llama.cpp's graph alone"):
        Runtime.open(FakeModel(["x"]), memory="8GiB", attention="tidal:layers=1")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(30, (2, 8, 14, 20)), (16, (2, 8)), (32, (2, 8, 14, 20)), (8, (2,)), (2, (1,)), (1, (0,))],
)
def test_default_layers_follow_the_depth(
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
        self.hook = LlamaHook(threads=2)
        options = LoadOptions(
            context=2048, batch_size=128, threads=2, eval_callback=self.hook.callback
        )
        self.model = GgufModel(self.spec, options)
        self.token_ids = self.model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
        self.dense = DenseController(self.hook)
        self.place = Reference(self.model, self.dense, self.token_ids, 1400, 32)

    def controller(self, text: str) -> Any:
        return parse_policy(text).resolve(self.spec).install(self.hook, self.spec)

    def logits(self, text: str, batches: tuple[int, ...]) -> list[bytes]:
        """The last row's logits of each pass after the prompt."""
        self.place.distance(Dense().install(self.hook, self.spec))  # the prompt alone is left
        controller, at, found = self.controller(text), 1400, []
        for rows in batches:
            controller.begin_decode()
            found.append(self.model.forward(self.token_ids[at : at + rows]).tobytes())
            at += rows
        return found

    def share(self, text: str, tokens: int = 8) -> float:
        before = self.hook.counts()
        self.logits(text, (1,) * tokens)
        after = self.hook.counts()
        prompt = 30 * sum(range(1401, 1401 + len(self.place._dense)))  # the reference's passes
        held = after.keys_held - before.keys_held - prompt
        return (after.keys_read - before.keys_read - prompt) / held


@pytest.fixture(scope="module")
def bench(smollm2: Path) -> Iterator[Bench]:
    made = Bench(smollm2)
    yield made
    made.model.close()
    made.hook.close()


def test_k_beyond_the_context_is_dense_bit_for_bit(bench: Bench) -> None:
    dense = bench.logits("dense", (1,) * 6)
    assert bench.logits(f"tidal:k=2048,{LAYERS}", (1,) * 6) == dense
    assert bench.logits(f"tidal:k=512,min_context=2048,{LAYERS}", (1,) * 6) == dense
    every = "+".join(map(str, range(30)))
    assert bench.logits(f"tidal:k=512,layers={every}", (1,) * 6) == dense
    assert bench.logits(f"tidal:k=512,{LAYERS}", (1,) * 6) != dense


def test_it_stays_close_to_dense_and_reads_less(bench: Bench) -> None:
    wide = bench.place.distance(bench.controller(f"tidal:k=700,{LAYERS}"))
    narrow = bench.place.distance(bench.controller(f"tidal:k=100,{LAYERS}"))
    assert 0 < wide.kl <= 0.02 < narrow.kl
    assert wide.top1_agreement >= 0.75
    assert bench.place.distance(bench.dense).kl == 0
    assert bench.share("dense") == 1
    assert 0.25 < bench.share(f"tidal:k=100,{LAYERS}") < bench.share(f"tidal:k=700,{LAYERS}") < 0.6


@pytest.mark.skipif("avx512_bf16" not in cpu_features(), reason="no avx512_bf16 here")
def test_a_prompt_in_bfloat16_is_read_again_and_stays_close(bench: Bench) -> None:
    use_bf16 = bench.place.distance(bench.controller("dense:prompts=bf16"))
    both = bench.place.distance(bench.controller(f"tidal:k=700,prompts=bf16,{LAYERS}"))
    assert 0 < use_bf16.kl <= 0.02
    assert 0 < both.kl <= 0.04
    assert bench.place.distance(bench.dense).kl == 0


def test_a_fraction_follows_the_context(bench: Bench) -> None:
    share = bench.share(f"tidal:k=25%,{LAYERS}")
    assert share == pytest.approx(6 / 30 + 24 / 30 * 0.25, abs=0.005)


def test_refreshing_less_often_reads_less_and_keeps_the_newest(bench: Bench) -> None:
    every, fourth = f"tidal:k=700,{LAYERS}", f"tidal:k=700,{LAYERS},refresh=4"
    assert bench.share(fourth) < bench.share(every)
    assert bench.logits(fourth, (1,)) == bench.logits(every, (1,))
    distance = bench.place.distance(bench.controller(fourth))
    assert distance.kl <= 0.08


def test_rows_of_one_pass_share_a_set(bench: Bench) -> None:
    """A pass of many rows is a prompt's and dense; a few rows are a draft's and sparse."""
    policy = f"tidal:k=300,{LAYERS}"
    assert bench.logits(policy, (4,)) != bench.logits("dense", (4,))
    assert bench.logits(policy, (33,)) == bench.logits("dense", (33,))


def test_a_prompt_is_exact_under_every_policy(bench: Bench) -> None:
    def last_logits(text: str) -> bytes:
        controller = bench.controller(text)
        bench.model.truncate(0)
        for at in range(0, 900, 100):
            controller.begin_prefill()
            logits = bench.model.forward(bench.token_ids[at : at + 100])
        return logits.tobytes()

    assert last_logits(f"tidal:k=100,{LAYERS}") == last_logits("dense")
    bench.model.truncate(0)


@pytest.mark.once
def test_threads_change_nothing(smollm2: Path) -> None:
    seen = set()
    for threads in (1, 2, 3):
        with Runtime.open(
            smollm2, memory="8GiB", context=1536, threads=threads, attention=f"tidal:k=200,{LAYERS}"
        ) as runtime:
            result = runtime.generate(TEXT[:3000], max_tokens=12, temperature=0)
            seen.add(result.token_ids)
            assert result.stats.attended_share is not None and result.stats.attended_share < 0.6
            assert result.stats.attention.startswith("tidal, k 200, selection layers 2+8+14+20")
            rows = {row.component: row.num_bytes for row in runtime.plan.rows}
            counts = runtime._loaded.kernel_counts()
            assert counts is not None and 0 < counts.scratch_bytes <= rows["attention scratch"]
    assert len(seen) == 1


@pytest.mark.once
def test_correction_makes_the_cache_exact_again(smollm2: Path) -> None:
    """Corrected after every token, all but the last row's own attention is dense attention's."""
    answers = {}
    for attention in ("dense", f"tidal:k=80,{LAYERS},correction=1", f"tidal:k=80,{LAYERS}"):
        with Runtime.open(smollm2, memory="8GiB", context=1536, attention=attention) as runtime:
            result = runtime.generate(TEXT[:3000], max_tokens=12, temperature=0)
            answers[attention.partition(",")[2]] = result.token_ids
    assert answers[""] == answers[f"{LAYERS},correction=1"] != answers[LAYERS]


def test_the_scratch_stays_inside_its_row(bench: Bench) -> None:
    controller = bench.controller(f"tidal:k=300,{LAYERS}")
    bench.place.distance(bench.dense)
    for rows in (1, 4, 32):
        controller.begin_decode()
        bench.model.truncate(1400)
        bench.model.forward(bench.token_ids[1400 : 1400 + rows])
    planned = attention_bytes(bench.spec, 2048, 2) + selection_bytes(bench.spec, 2048, 4)
    assert bench.hook.counts().scratch_bytes <= planned


@pytest.mark.once
def test_two_policies_in_two_runtimes_do_not_disturb_each_other(smollm2: Path) -> None:
    def answer(attention: str, other: str | None = None) -> Any:
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

    sparse, dense = f"tidal:k=80,{LAYERS}", "dense"
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
