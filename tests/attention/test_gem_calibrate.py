"""The search for gem's layer, on made-up scores; and a model's own scores against those of a filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_model

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.evaluation.questions import Haystack, WholePrompt
from lowtide.attention.gem import calibrate as gem_calibrate
from lowtide.attention.gem.calibrate import GemSearch
from lowtide.attention.gem.policy import Gem, are_kept, kept_positions, needed_k
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import ByteTokenizer, FakeModel
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.gguf.spec import read_spec
from lowtide.runtime.kv.prompt_filter import PromptFilter

pytestmark = pytest.mark.once

CONTEXT = 4096
DOT = ord(".")
TEXT = [DOT] * (2 * CONTEXT + 2)
Scores = Callable[[np.ndarray], np.ndarray | None]


def finds(ids: np.ndarray) -> np.ndarray:
    """Whatever is no dot: all hidden sentences, which need some 600 tokens to be kept."""
    return (ids != DOT).astype(np.float32)


def finds_with_noise(ids: np.ndarray) -> np.ndarray:
    """The same behind 400 of the dots: inside k, and without a margin."""
    scores = finds(ids)
    scores[np.flatnonzero(ids == DOT)[200:600]] = 2
    return scores


def sees_the_end(ids: np.ndarray) -> np.ndarray:
    """A sliding window."""
    scores = finds(ids)
    scores[:-500] = 0
    return scores


def is_not_ours(ids: np.ndarray) -> None:
    return None


class Layers:
    """Stands in for `WholePrompt`: made-up scores by layer; every prompt is answered, or none."""

    def __init__(self, *scores: Scores, answers: bool = True) -> None:
        self._scores = scores
        self._answers = answers
        self.scored: list[int] = []
        self._ids = np.zeros(0)

    def hold(self, token_ids: Sequence[int]) -> None:
        self._ids = np.array(token_ids)

    def forget(self) -> None:
        self._ids = np.zeros(0)

    def scores(self, layer: int) -> np.ndarray | None:
        self.scored.append(layer)
        return self._scores[layer](self._ids)

    def answers(self, hidden: object) -> bool:
        return self._answers


class Search:
    """A search over made-up layers; `replies` says of each question whether what was kept answers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: Layers, policy: Gem) -> None:
        self.replies: list[bool] = []
        self.said: list[str] = []
        model = FakeModel(context=CONTEXT)
        model.spec = replace(model.spec, num_layers=len(layers._scores))
        monkeypatch.setattr(gem_calibrate, "WholePrompt", lambda *_: layers)
        monkeypatch.setattr(
            gem_calibrate, "is_answered", lambda *_: self.replies.pop(0) if self.replies else True
        )
        hook: Any = None  # nothing is computed
        self.calibrator = GemSearch(
            model, hook, TEXT, CONTEXT, lambda text: text + "\n", policy, self.said.append
        )

    def best(self, *ks: int) -> Any:
        return self.calibrator.calibration(ks or (1024,), text="dots")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    def made(*scores: Scores, answers: bool = True, policy: Gem | None = None) -> Search:
        made.layers = Layers(*scores, answers=answers)  # type: ignore[attr-defined]
        return Search(monkeypatch, made.layers, policy or Gem())  # type: ignore[attr-defined]

    return made


def test_the_earliest_layer_that_keeps_all_with_a_margin(search: Callable[..., Search]) -> None:
    found = search(sees_the_end, finds_with_noise, is_not_ours, finds, finds).best()
    assert (found.layer, found.k) == (3, 1024)
    assert found.num_asked == found.num_kept == found.num_dense_answered == found.num_answered == 18
    assert 0.25 <= found.margin < 0.9
    assert found.context == CONTEXT and found.text == "dots" and found.has_rule(Gem().rule_settings)


def test_what_is_held_against_lies_alone_in_its_text() -> None:
    haystack = Haystack(ByteTokenizer(), TEXT, lambda text: text + "\n")
    together = list(gem_calibrate.questions_in_one_text(haystack, (2048, 4096), seed=3))
    alone = list(gem_calibrate.questions_alone(haystack, (2048, 4096), seed=3))
    assert len(together) == len(alone) == 18
    for some in (together, alone):
        cases = {(h.question.kind, h.length, h.depth) for h in some}
        assert len(cases) == 18
    assert [h.depth for h in alone[:9]] == [0.85] * 3 + [0.5] * 3 + [0.15] * 3
    for hidden in alone:
        told = sum(end - begin for begin, end in hidden.spans)
        said = len(hidden.question.aside + hidden.question.text) + len("Read this text.")
        assert sum(token_id not in (DOT, 10) for token_id in hidden.token_ids) < told + said


def test_layers_that_failed_are_not_scored_again(search: Callable[..., Search]) -> None:
    made = search(sees_the_end, is_not_ours, finds)
    made.best()
    scored = search.layers.scored  # type: ignore[attr-defined]
    assert scored.count(1) == 1 and scored.count(0) < 4 and scored.count(2) == 36


def test_a_stated_layer_is_the_only_one(search: Callable[..., Search]) -> None:
    assert search(finds, finds, policy=Gem(layer=1)).best().layer == 1
    assert set(search.layers.scored) == {1}  # type: ignore[attr-defined]


def test_the_smallest_k_that_will_do(search: Callable[..., Search]) -> None:
    assert search(finds).best(1024, 900, 100).k == 900


def test_a_layer_that_loses_answers_gives_way_to_the_next(search: Callable[..., Search]) -> None:
    made = search(finds, finds)
    made.replies = [False, False, *[True] * 16]
    assert made.best().layer == 1
    assert [line for line in made.said if "layer 0" in line and "16 of 18 answers" in line]


def test_one_answer_in_twenty_may_be_lost(search: Callable[..., Search]) -> None:
    made = search(finds, finds)
    made.replies = [False, *[True] * 17]
    found = made.best()
    assert (found.layer, found.num_answered, found.num_dense_answered) == (0, 17, 18)
    assert [gem_calibrate.most_lost(n) for n in (1, 20, 21, 40)] == [1, 1, 2, 2]


def test_nothing_that_holds(search: Callable[..., Search]) -> None:
    with pytest.raises(
        NotCalibrated, match="no layer of fake keeps every .* layer 0, the last one"
    ):
        search(sees_the_end, is_not_ours).best()
    made = search(finds)
    made.replies = [False] * 18
    with pytest.raises(NotCalibrated, match="layer 0 of fake with k 1024 keeps less than 95%"):
        made.best()
    with pytest.raises(NotCalibrated, match="answers none of 18 questions from whole prompts"):
        search(finds, answers=False).best()


def test_what_cannot_be_searched(search: Callable[..., Search]) -> None:
    with pytest.raises(BadOption, match="k is 1025 and the context 4096: 4100 or more"):
        search(finds).best(1025)
    model = FakeModel(context=CONTEXT)
    model.spec = replace(model.spec, sliding_window=2049)
    hook: Any = None
    with pytest.raises(BadOption, match="sliding windows of 2049 tokens: 4098 or more"):
        GemSearch(model, hook, TEXT, CONTEXT, str, Gem())


def test_the_k_that_is_needed_is_the_least_that_keeps() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        scores = random.random(600).astype(np.float32)  # no two are equal, but pools are
        begin = int(random.integers(10, 500))
        spans = ((begin, begin + 9),)
        policy = Gem(k=100, pool_size=1)
        needed = needed_k(scores, policy, spans)
        for k in (needed - 1, needed):
            kept = kept_positions(scores, replace(policy, k=max(k, 68)))
            assert are_kept(kept, spans) == (k >= needed)


def test_a_span_that_a_layer_does_not_see_needs_everything() -> None:
    scores = np.zeros(600, np.float32)
    scores[400:] = 1
    assert needed_k(scores, Gem(), ((100, 110),)) == 600
    assert needed_k(scores, Gem(), ((596, 600),)) == 4 + 64


PROMPTS = [[5 + i * i % 300 for i in range(700)], [5 + i * i % 300 for i in range(500)] + [9] * 150]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "random.gguf", layers=4, width=128, heads=4, kv_heads=2)


def test_one_reading_scores_as_every_filter_does(random_model: Path) -> None:
    hook = LlamaHook(threads=1)
    options = LoadOptions(context=768, batch_size=128, threads=1, eval_callback=hook.callback)
    with GgufModel(read_spec(random_model), options) as model:
        for layer in range(4):
            policy = Gem(k=100, layer=layer, min_prompt=0).resolve(model.spec)
            whole = WholePrompt(model, hook, policy.rule)
            for prompt in PROMPTS:
                whole.hold(prompt)
                found = whole.scores(layer)
                again = whole.scores(layer)
                after = whole.nll(prompt[:5])
                assert found is not None and again is not None
                assert np.array_equal(found, again)
                whole.forget()
                prompt_filter = PromptFilter(model, hook, policy)
                prompt_filter.filtered(prompt)
                assert prompt_filter.last is not None
                assert found == pytest.approx(prompt_filter.last.scores, rel=1e-3, abs=1e-6)
                whole.hold(prompt)
                assert whole.nll(prompt[:5]) == pytest.approx(after, rel=1e-4)
            whole.forget()
            assert model.num_tokens == 0
    hook.close()
