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
from lowtide.attention.calibration import Calibration, NotCalibrated
from lowtide.attention.calibrator import CalibrationContext
from lowtide.attention.evaluation.questions import (
    Haystack,
    WholePrompt,
    are_retained,
    questions_alone,
    questions_in_one_text,
)
from lowtide.attention.gem import calibrate as gem_calibrate
from lowtide.attention.gem.calibrate import GemSearch
from lowtide.attention.gem.policy import Gem
from lowtide.attention.gem.selection import RULE_FIELDS, GemSelection
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import ByteTokenizer, FakeModel
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.runtime.kv.prompt_filter import PromptFilter

CONTEXT = 4096
DOT = ord(".")
TEXT = [DOT] * (2 * CONTEXT + 2)
Scores = Callable[[np.ndarray], np.ndarray | None]


def finds(ids: np.ndarray) -> np.ndarray:
    """Scores everything but dots: all hidden sentences, which need some 600 tokens."""
    return (ids != DOT).astype(np.float32)


def finds_with_noise(ids: np.ndarray) -> np.ndarray:
    """Scores 400 of the dots higher: the sentences fit k, but without a margin."""
    scores = finds(ids)
    scores[np.flatnonzero(ids == DOT)[200:600]] = 2
    return scores


def sees_the_end(ids: np.ndarray) -> np.ndarray:
    """Scores like a layer with a sliding window."""
    scores = finds(ids)
    scores[:-500] = 0
    return scores


def is_not_scored(ids: np.ndarray) -> None:
    return None


class Layers:
    """A fake `WholePrompt` with made-up scores for each layer; it answers every prompt, or none."""

    def __init__(self, *scores: Scores, answers: bool = True) -> None:
        self._scores = scores
        self._answers = answers
        self.scored: list[int] = []
        self._ids = np.zeros(0)

    def read(self, token_ids: Sequence[int]) -> None:
        self._ids = np.array(token_ids)

    def clear(self) -> None:
        self._ids = np.zeros(0)

    def scores(self, layer: int) -> np.ndarray | None:
        self.scored.append(layer)
        return self._scores[layer](self._ids)

    def answers(self, hidden: object) -> bool:
        return self._answers


class Search:
    """A search over made-up layers; `replies` are whether the retained tokens answer each question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: Layers, policy: Gem) -> None:
        self.replies: list[bool] = []
        self.lines: list[str] = []
        model = FakeModel(context=CONTEXT)
        model.spec = replace(model.spec, num_layers=len(layers._scores))
        monkeypatch.setattr(gem_calibrate, "WholePrompt", lambda *_: layers)
        monkeypatch.setattr(
            gem_calibrate, "is_answered", lambda *_: self.replies.pop(0) if self.replies else True
        )
        hook: Any = None  # nothing is computed
        context = context_of(model, hook, self.lines.append)
        self.search = GemSearch(context, selections(policy), policy.layer)

    def best(self, *ks: int) -> Calibration:
        return self.search.calibration(ks or (1024,))


def context_of(model: Any, hook: Any, progress: Any = print) -> CalibrationContext:
    return CalibrationContext(
        model=model,
        hook=hook,
        token_ids=TEXT,
        context=CONTEXT,
        framing=lambda text: text + "\n",
        text="dots",
        progress=progress,
    )


def selections(policy: Gem) -> Callable[[int, int], GemSelection]:
    return lambda layer, k: replace(policy, layer=layer, k=k).selection


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    def made(*scores: Scores, answers: bool = True, policy: Gem | None = None) -> Search:
        made.layers = Layers(*scores, answers=answers)  # type: ignore[attr-defined]
        return Search(monkeypatch, made.layers, policy or Gem())  # type: ignore[attr-defined]

    return made


def test_the_earliest_layer_that_retains_all_with_a_margin_is_taken(
    search: Callable[..., Search],
) -> None:
    found = search(sees_the_end, finds_with_noise, is_not_scored, finds, finds).best()
    assert (found.params["layer"], found.params["k"]) == (3, 1024)
    counts = ("num_asked", "num_kept", "num_dense_answered", "num_answered")
    assert [found.metrics[name] for name in counts] == [18] * 4
    assert 0.25 <= found.metrics["margin"] < 0.9
    assert (found.policy, found.context, found.text) == ("gem", CONTEXT, "dots")
    assert all(found.params[name] == getattr(Gem(), name) for name in RULE_FIELDS)


def test_questions_of_the_check_are_alone_in_their_text() -> None:
    haystack = Haystack(ByteTokenizer(), TEXT, lambda text: text + "\n")
    together = list(questions_in_one_text(haystack, (2048, 4096), seed=3))
    alone = list(questions_alone(haystack, (2048, 4096), seed=3))
    assert len(together) == len(alone) == 18
    for some in (together, alone):
        cases = {(h.question.kind, h.length, h.depth) for h in some}
        assert len(cases) == 18
    assert [h.depth for h in alone[:9]] == [0.85] * 3 + [0.5] * 3 + [0.15] * 3
    for hidden in alone:
        hidden_tokens = sum(end - begin for begin, end in hidden.spans)
        asked_tokens = len(hidden.question.aside + hidden.question.text) + len("Read this text.")
        assert (
            sum(token_id not in (DOT, 10) for token_id in hidden.token_ids)
            < hidden_tokens + asked_tokens
        )


def test_layers_that_failed_are_not_scored_again(search: Callable[..., Search]) -> None:
    made = search(sees_the_end, is_not_scored, finds)
    made.best()
    scored = search.layers.scored  # type: ignore[attr-defined]
    assert scored.count(1) == 1 and scored.count(0) < 4 and scored.count(2) == 36


def test_a_layer_that_the_user_chose_is_the_only_candidate(search: Callable[..., Search]) -> None:
    assert search(finds, finds, policy=Gem(layer=1)).best().params["layer"] == 1
    assert set(search.layers.scored) == {1}  # type: ignore[attr-defined]


def test_the_smallest_k_that_suffices_is_taken(search: Callable[..., Search]) -> None:
    assert search(finds).best(1024, 900, 100).params["k"] == 900


def test_a_layer_that_loses_answers_is_not_taken(search: Callable[..., Search]) -> None:
    made = search(finds, finds)
    made.replies = [False, False, *[True] * 16]
    assert made.best().params["layer"] == 1
    assert [line for line in made.lines if "layer 0" in line and "16 of 18 questions" in line]


def test_one_answer_in_twenty_may_be_lost(search: Callable[..., Search]) -> None:
    made = search(finds, finds)
    made.replies = [False, *[True] * 17]
    found = made.best()
    assert found.params["layer"] == 0
    assert (found.metrics["num_answered"], found.metrics["num_dense_answered"]) == (17, 18)
    assert [gem_calibrate.most_lost(n) for n in (1, 20, 21, 40)] == [1, 1, 2, 2]


def test_if_nothing_holds_there_is_no_calibration(search: Callable[..., Search]) -> None:
    with pytest.raises(
        NotCalibrated, match="no layer of fake retains every .* layer 0, the last one"
    ):
        search(sees_the_end, is_not_scored).best()
    made = search(finds)
    made.replies = [False] * 18
    with pytest.raises(NotCalibrated, match="layer 0 of fake with k 1024 retains less than 95%"):
        made.best()
    with pytest.raises(NotCalibrated, match="answers none of 18 questions from whole prompts"):
        search(finds, answers=False).best()


def test_a_context_that_is_too_short_is_refused(search: Callable[..., Search]) -> None:
    with pytest.raises(
        BadOption, match="k is 1025 and the context is 4096; it must be 4100 or more"
    ):
        search(finds).best(1025)
    model = FakeModel(context=CONTEXT)
    model.spec = replace(model.spec, sliding_window=2049)
    hook: Any = None
    with pytest.raises(BadOption, match="sliding windows of 2049 tokens; it must be 4098 or more"):
        GemSearch(context_of(model, hook), selections(Gem()), None)


def test_the_needed_k_is_the_smallest_that_retains() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        scores = random.random(600).astype(np.float32)  # no two are equal, but pools are
        begin = int(random.integers(10, 500))
        spans = ((begin, begin + 9),)
        policy = Gem(layer=0, k=100, pool_size=1)
        needed = policy.selection.needed_k(scores, spans)
        for k in (needed - 1, needed):
            positions = replace(policy, k=max(k, 68)).selection.retained(scores)
            assert are_retained(positions, spans) == (k >= needed)


def test_a_span_that_a_layer_does_not_see_needs_everything() -> None:
    scores = np.zeros(600, np.float32)
    scores[400:] = 1
    selection = Gem(layer=0, k=100).selection
    assert selection.needed_k(scores, ((100, 110),)) == 600
    assert selection.needed_k(scores, ((596, 600),)) == 4 + 64


PROMPTS = [[5 + i * i % 300 for i in range(700)], [5 + i * i % 300 for i in range(500)] + [9] * 150]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "random.gguf", layers=4, width=128, heads=4, kv_heads=2)


def test_scores_of_a_whole_prompt_equal_those_of_a_filter(random_model: Path) -> None:
    hook = LlamaHook(threads=1)
    options = LoadOptions(context=768, batch_size=128, threads=1, eval_callback=hook.callback)
    with GgufModel(read_spec(random_model), options) as model:
        for layer in range(4):
            policy = Gem(k=100, layer=layer, min_prompt=0).resolve(model.spec)
            whole = WholePrompt(model, hook, policy.selection.rule)
            for prompt in PROMPTS:
                whole.read(prompt)
                found = whole.scores(layer)
                again = whole.scores(layer)
                after = whole.nll(prompt[:5])
                assert found is not None and again is not None
                assert np.array_equal(found, again)
                whole.clear()
                prompt_filter = PromptFilter(model, hook, policy.selection)
                prompt_filter.filter(prompt)
                assert prompt_filter.last is not None
                assert found == pytest.approx(prompt_filter.last.scores, rel=1e-3, abs=1e-6)
                whole.read(prompt)
                assert whole.nll(prompt[:5]) == pytest.approx(after, rel=1e-4)
            whole.clear()
            assert model.num_tokens == 0
    hook.close()
