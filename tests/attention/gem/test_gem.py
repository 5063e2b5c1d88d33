"""GemFilter: its settings, its selection against plain loops, and its pass through the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dumped_nodes import DumpedNodes
from gguf_files import write_model
from reference import attention_weights

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.dense import Dense, DenseController
from lowtide.attention.gem.policy import Gem, GemMemory
from lowtide.attention.gem.selection import GemSelection, pooled
from lowtide.attention.tidal.policy import Tidal
from lowtide.memory.plan.estimates import padded_context
from lowtide.models.errors import BadOption
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.spec import ModelSpec
from lowtide.runtime.kv.prompt_filter import PromptFilter

PROMPT = [5 + i * i % 300 for i in range(700)]


def test_the_rule_of_the_paper_can_be_set() -> None:
    rule = Gem(k=100, layer=0).selection.rule
    assert (rule.num_tokens, rule.use_softmax, rule.use_maximum) == (16, 1, 1)
    paper = Gem(
        k=40, layer=0, rows=1, weights="raw", heads="sum", pool="mean", pool_size=5, first=0, last=0
    )
    rule = paper.selection.rule
    assert (rule.num_tokens, rule.use_softmax, rule.use_maximum) == (1, 0, 0)


def test_a_policy_is_resolved_for_the_model(smollm2_spec: ModelSpec) -> None:
    assert Gem().resolve(smollm2_spec).layer == 7
    fitted = Gem(then=Tidal()).resolve(smollm2_spec)
    assert fitted.then == fitted.following == Tidal().resolve(smollm2_spec)
    assert fitted.shares_selection and not Gem().resolve(smollm2_spec).shares_selection
    memory = fitted.memory
    assert memory.following == fitted.then.memory and memory.filter_prefill is not None
    assert (memory.filter_prefill.num_layers, memory.filter_prefill.min_tokens) == (8, 1024)
    windowed = replace(smollm2_spec, sliding_window=512)
    with pytest.raises(BadOption, match="has sliding windows: name a layer, as in gem:layer=7"):
        Gem(rows=1).resolve(windowed)  # no calibration has that rule


def test_short_prompts_and_prompts_that_fit_k_are_not_filtered() -> None:
    def selection(**settings: Any) -> GemSelection:
        return Gem(layer=0, **{"k": 512, **settings}).selection

    assert not selection(min_prompt=1024).applies_to(1024)
    assert selection(min_prompt=1024).applies_to(1025)
    assert not selection(k=2000, min_prompt=0).applies_to(2000)
    assert not selection(min_prompt=0).applies_to(60)
    assert selection(k=0.5, min_prompt=0).budget(2001) == 1001


def test_continuing_a_text_is_refused_unless_it_is_set() -> None:
    assert "ask in a chat" in (Gem().completion_refusal or "")
    assert Gem(continues=True).completion_refusal is None


def selected_by_loops(scores: list[float], policy: GemSelection) -> list[int]:
    """Return the retained positions by plain loops."""
    half, count = policy.pool_size // 2, len(scores)
    ranked = []
    for i in range(count):
        around = scores[max(i - half, 0) : i + half + 1]
        ranked.append(max(around) if policy.pool == "max" else sum(around) / policy.pool_size)
    forced = [i for i in range(count) if i < policy.first or i >= count - policy.last]
    others = sorted((i for i in range(count) if i not in forced), key=lambda i: (-ranked[i], i))
    return sorted((forced + others)[: policy.budget(count)])


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize(
    ("k", "size", "first", "last"), [(100, 33, 4, 64), (40, 5, 0, 0), (7, 1, 1, 3)]
)
def test_selections_are_those_of_loops(pool: str, k: int, size: int, first: int, last: int) -> None:
    gem = Gem(layer=0, k=k, pool=pool, pool_size=size, first=first, last=last)
    policy = gem.selection
    random = np.random.default_rng(k)
    for count in (k + 1, 300, 517):
        # Sixteenths add up exactly in any order, so that equal means are equal.
        scores = (random.integers(0, 50, count) / 16).astype(np.float32)
        found = policy.retained(scores)
        if pool == "mean":  # 1/5 and 1/33 are not sixteenths: compare the means
            reached = pooled(scores, pool, size)
            expected = selected_by_loops(scores.tolist(), policy)
            assert sorted(reached[found]) == pytest.approx(sorted(reached[expected]))
        else:
            assert found.tolist() == selected_by_loops(scores.tolist(), policy)


class OpenModel:
    """A small model of random weights under the hook."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.hook = LlamaHook(threads=2)
        options = LoadOptions(
            context=768, batch_size=batch_size, threads=2, eval_callback=self.hook.callback
        )
        self.model = GgufModel(read_spec(path), options)
        # An early exit writes no logits: they are not looked at, as in the contexts that filter.
        self.model._has_logits = False

    def scores(self, layer: int, **settings: Any) -> np.ndarray:
        policy = Gem(k=100, layer=layer, min_prompt=0, **settings).resolve(self.model.spec)
        prompt_filter = PromptFilter(self.model, self.hook, policy.selection)
        prompt_filter.filter(PROMPT)
        assert prompt_filter.last is not None
        return prompt_filter.last.scores

    def logits(self) -> np.ndarray:
        """Return the logits of two tokens after a prompt that is read whole."""
        controller = DenseController(self.hook)
        controller.begin_prefill()
        self.model.truncate(0)
        rows = self.model.batch_size
        for at in range(0, 320, rows):
            self.model.forward(PROMPT[at : at + rows])
        controller.begin_decode()
        return np.array([self.model.forward((token_id,)).copy() for token_id in (7, 9)])

    def close(self) -> None:
        self.model.close()
        self.hook.close()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "random.gguf", layers=5, width=128, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def small_model(random_model: Path) -> Iterator[OpenModel]:
    made = OpenModel(random_model, batch_size=128)
    yield made
    made.close()


def weights_by_numpy(path: Path, layer: int) -> np.ndarray:
    """Return the weights (queries, heads, keys) of the last 16 tokens under llama.cpp's own attention."""
    dumped = DumpedNodes()
    options = LoadOptions(context=768, batch_size=128, threads=2, eval_callback=dumped.callback)
    with GgufModel(read_spec(path), options) as model:
        for begin in range(0, len(PROMPT), 100):
            dumped.recording = begin + 100 >= len(PROMPT)
            model.forward(PROMPT[begin : begin + 100])
    node = dumped.nodes[layer]
    k = node.k.astype(np.float64)
    return attention_weights(node.q[-16:], k, node.mask[-16:], scale=node.scale)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_scores_equal_numpy_over_the_last_queries(
    layer: int, small_model: OpenModel, random_model: Path
) -> None:
    weights = weights_by_numpy(random_model, layer)[:, :, : len(PROMPT)]
    largest, total = weights.max(axis=(0, 1)), weights.sum(axis=(0, 1))
    assert small_model.scores(layer) == pytest.approx(largest, rel=0.02, abs=1e-5)
    assert small_model.scores(layer, heads="sum") == pytest.approx(total, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("weights", ["softmax", "raw"])
@pytest.mark.parametrize("heads", ["max", "sum"])
def test_a_prompt_in_small_passes_is_scored_the_same(
    weights: str, heads: str, small_model: OpenModel, random_model: Path
) -> None:
    small = OpenModel(random_model, batch_size=32)
    found = small.scores(3, weights=weights, heads=heads)
    small.close()
    whole = small_model.scores(3, weights=weights, heads=heads)
    assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_scratch_stays_inside_the_plan(random_model: Path) -> None:
    made = OpenModel(random_model, batch_size=128)
    made.logits()
    spec, before = made.model.spec, made.hook.counts().scratch_bytes
    made.scores(2)
    taken = made.hook.counts().scratch_bytes - before
    made.close()
    planned = GemMemory().scratch_bytes(spec, 768, 2) - 40 * padded_context(768)
    assert 4 * spec.num_heads * len(PROMPT) < taken <= planned


def test_an_early_exit_at_any_layer_leaves_the_model_as_it_was(small_model: OpenModel) -> None:
    before = small_model.logits()
    for layer in range(small_model.model.spec.num_layers):
        scores = small_model.scores(layer)
        assert scores.shape == (len(PROMPT),) and scores.max() > 0
        assert small_model.model.num_tokens == 0
    assert np.array_equal(before, small_model.logits())


def test_a_prompt_that_repeats_one_token(small_model: OpenModel) -> None:
    policy = Gem(k=100, layer=1, min_prompt=0).resolve(small_model.model.spec)
    retained = PromptFilter(small_model.model, small_model.hook, policy.selection).filter([7] * 500)
    assert retained == [7] * 100


def test_the_cache_key_has_all_settings() -> None:
    assert Gem(k=100).cache_key != Gem(k=101).cache_key
    assert Gem(then=Dense()).cache_key != Gem(then=Tidal()).cache_key
