"""Finds the layer that GemFilter can select by: the cheapest that retains what questions ask for.

Sentences are hidden in a text at several depths of two lengths, and asked for (`evaluation.questions`). A
prompt is read once by all layers; then every layer scores it, with the prompt's last queries. The k that a
layer needs is the one that retains the worst placed sentence whole: a layer that does not see the whole
prompt, or does not look for what is asked, needs nearly all of it. Layers that need less than k by a margin
are tried end to end, the cheapest first, on text and questions that the search did not see, each alone in
its text: the retained tokens must answer what the whole prompt answers. The paper picks its layer by hand
(arXiv 2409.17422, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowtide.attention.calibration import Calibration, NotCalibrated
from lowtide.attention.calibrator import CalibrationContext, CalibrationRequest, Calibrator
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.questions import (
    Haystack,
    HiddenQuestion,
    WholePrompt,
    is_answered,
    questions_alone,
    questions_in_one_text,
)
from lowtide.attention.gem.selection import GemSelection
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

KEY = "gem"
LEAST_MARGIN = 0.25
"""The search leaves this share of k unused: it sees few sentences."""
GOAL_PERCENT = 95
"""How many of the answers of whole prompts, and of the sentences, must survive; one may always be lost."""
MAX_TRIED = 6
"""Candidates that are tried end to end."""
K_CHOICES = (512, 768, 1024)
CONTEXTS_OF_K = 4
"""The context is at least so many times k: a filter that retains most of a prompt shows nothing."""

MakeSelection = Callable[[int, int], GemSelection]
"""Makes the selection of a layer and k, by the rule that is calibrated."""


class GemCalibrator(Calibrator):
    """Finds the layer and k for a rule; a `layer` or `k` that the user chose is not searched for."""

    options = ("k",)
    compared_tokens = 1
    usage = KEY

    def __init__(
        self,
        make_selection: MakeSelection,
        memory: AttentionMemory,
        layer: int | None,
        k: int | float | None,
        *,
        has_file: bool,
    ) -> None:
        self._make_selection = make_selection
        self._memory = memory
        self._layer, self._k = layer, k
        self._has_file = has_file

    def check(self, spec: ModelSpec, request: CalibrationRequest) -> None:
        """Raise `BadOption` for a calibration file, a second k, or a layer that the model does not have."""
        if self._has_file:
            raise BadOption("calibrate makes a calibration file: leave gem's calibration out")
        if self._k is not None and (self._k < 1 or request.k_choices):
            raise BadOption(
                f"gem's k is {self._k}{' and --k is given' if request.k_choices else ''}: state it once, as "
                "a number of tokens"
            )
        if self._layer is not None and not 0 <= self._layer < spec.num_layers:
            raise BadOption(
                f"gem's layer is {self._layer}; {spec.name} has layers 0 to {spec.num_layers - 1}"
            )

    def memory(self, spec: ModelSpec) -> AttentionMemory:
        """Return the memory of one layer's scores."""
        return self._memory

    def search(self, context: CalibrationContext, request: CalibrationRequest) -> Calibration:
        """Search for the cheapest layer and k that lose nearly nothing."""
        most = context.context // CONTEXTS_OF_K
        ks = request.k_choices or tuple(k for k in K_CHOICES if k <= most) or (most,)
        if self._k is not None:
            ks = (int(self._k),)
        return GemSearch(context, self._make_selection, self._layer).calibration(ks)

    def describe(self, calibration: Calibration) -> str:
        """Describe the layer, k, and what was lost."""
        params, metrics = calibration.params, calibration.metrics
        return (
            f"k {params['k']}, layer {params['layer']}: of {metrics['num_asked']} questions on up to "
            f"{calibration.context:,} tokens {metrics['num_kept']} had their sentences retained, with "
            f"{metrics['margin']:.0%} of k to spare; whole prompts answer {metrics['num_dense_answered']}, "
            f"filtered prompts {metrics['num_answered']} of these"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer and a k, and the k that the layer needed in the search."""

    layer: int
    k: int
    needed_k: int

    def cost(self, num_layers: int, context: int) -> float:
        """Return the cost of a filtered prompt of `context` tokens, in tokens of a whole prompt."""
        return (self.layer + 1) / num_layers * context + self.k


@dataclass(slots=True)
class _Trial:
    """A question that the search did not see, and what candidates retain of its prompt."""

    hidden: HiddenQuestion
    is_answered_whole: bool
    retained: dict[Candidate, list[int]] = field(default_factory=dict)
    needed: dict[Candidate, int] = field(default_factory=dict)


class GemSearch:
    """Searches one model for the layer to filter by; if `layer` is set, it is the only candidate."""

    def __init__(
        self, context: CalibrationContext, make_selection: MakeSelection, layer: int | None
    ) -> None:
        model = context.model
        window = model.spec.sliding_window
        if window is not None and context.context < 2 * window:
            raise BadOption(
                f"{option('context')} is {context.context} and {model.spec.name} has sliding windows of {window} "
                f"tokens; it must be {2 * window} or more, to show which layers see beyond the window"
            )
        searched, held_out = context.halves
        self._searched, self._held_out = (
            Haystack(model.tokenizer, text, context.framing) for text in (searched[1:], held_out)
        )
        self._request = context
        self._model = model
        self._controller = DenseController(context.hook)
        self._make_selection = make_selection
        self._whole = WholePrompt(model, context.hook, make_selection(0, 1024).rule)
        self._context = context.context
        self._lengths = (context.context // 2, context.context)
        self._layer = layer
        self._progress = context.progress

    def calibration(self, k_choices: Sequence[int]) -> Calibration:
        """Return the cheapest candidate that holds on text that the search did not see.

        Raises `NotCalibrated` if none does, `BadOption` for a k that the context is too short for.
        """
        for k in k_choices:
            if CONTEXTS_OF_K * k > self._context:
                raise BadOption(
                    f"k is {k} and the context is {self._context}; it must be {CONTEXTS_OF_K * k} or more, "
                    "so that a filter has something to leave out"
                )
        candidates = self._candidates(k_choices)
        trials = self._trials(candidates)
        if not any(trial.is_answered_whole for trial in trials):
            raise NotCalibrated(
                f"{self._model.spec.name} answers none of {len(trials)} questions from whole prompts, so a "
                f"filter has no answers to keep: use another model, or a smaller {option('context')}"
            )
        for candidate in candidates:
            metrics = self._measured(candidate, trials)
            self._progress(
                f"layer {candidate.layer}, k {candidate.k}, on other text: retains "
                f"{metrics['num_kept']} of {metrics['num_asked']} sentences, and answers "
                f"{metrics['num_answered']} of {metrics['num_dense_answered']} questions"
            )
            num_answers, num_asked = int(metrics["num_dense_answered"]), int(metrics["num_asked"])
            holds = num_answers - metrics["num_answered"] <= most_lost(num_answers)
            if holds and num_asked - metrics["num_kept"] <= most_lost(num_asked):
                rule = self._make_selection(candidate.layer, candidate.k).rule_params
                params = {"layer": candidate.layer, "k": candidate.k, **rule}
                return self._request.calibration(KEY, metrics, params)
        raise NotCalibrated(
            f"layer {candidates[0].layer} of {self._model.spec.name} with k {candidates[0].k} retains less "
            f"than {GOAL_PERCENT}% of the sentences, or of the answers of whole prompts, on other text: "
            "raise --k"
        )

    def _candidates(self, k_choices: Sequence[int]) -> list[Candidate]:
        """Return those that retain every hidden sentence with a margin, the cheapest first."""
        candidates = [
            Candidate(layer, k, least)
            for layer, least in self._needed(max(k_choices)).items()
            for k in k_choices
            if least <= most_needed(k)
        ]
        num_layers = self._model.spec.num_layers
        candidates.sort(key=lambda candidate: candidate.cost(num_layers, self._context))
        return candidates[:MAX_TRIED]

    def _needed(self, k: int) -> dict[int, int]:
        """Return the layers that retain every sentence with `k`, and the k that each needs for it."""
        layers = range(self._model.spec.num_layers) if self._layer is None else (self._layer,)
        needed = dict.fromkeys(layers, 0)
        for hidden in questions_in_one_text(self._searched, self._lengths, seed=0):
            self._whole.read(hidden.token_ids)
            for layer in needed:
                needed[layer] = max(needed[layer], self._needed_by(layer, k, hidden))
            remaining = {layer: least for layer, least in needed.items() if least <= most_needed(k)}
            if not remaining:
                best = min(needed, key=lambda layer: needed[layer])
                raise NotCalibrated(
                    f"no layer of {self._model.spec.name} retains every hidden sentence with k {k} and a "
                    f"margin: layer {best}, the last one that did, needs a k of {needed[best]} for a "
                    f"{hidden}; raise --k"
                )
            needed = remaining
            self._progress(f"{hidden}: {len(needed)} layers retain it, the first is {min(needed)}")
        return needed

    def _needed_by(self, layer: int, k: int, hidden: HiddenQuestion) -> int:
        scores = self._whole.scores(layer)
        if scores is None:
            return len(hidden.token_ids)
        return self._make_selection(layer, k).needed_k(scores, hidden.spans)

    def _trials(self, candidates: Sequence[Candidate]) -> list[_Trial]:
        """Read what the search did not see, and select from it by every candidate."""
        trials = []
        for hidden in questions_alone(self._held_out, self._lengths, seed=1):
            self._whole.read(hidden.token_ids)
            trial = _Trial(hidden, self._whole.answers(hidden))
            for candidate in candidates:
                scores = self._whole.scores(candidate.layer)
                assert scores is not None, "the layer has scored before"
                selection = self._make_selection(candidate.layer, candidate.k)
                positions = selection.retained(scores)
                trial.retained[candidate] = [hidden.token_ids[position] for position in positions]
                trial.needed[candidate] = selection.needed_k(scores, hidden.spans)
            trials.append(trial)
            answered = "answered" if trial.is_answered_whole else "not answered"
            self._progress(f"{hidden}, on other text: {answered} from the whole prompt")
        self._whole.clear()
        return trials

    def _measured(self, candidate: Candidate, trials: Sequence[_Trial]) -> dict[str, float]:
        """Answer from the retained tokens the questions that whole prompts answer."""
        num_answered = 0
        for trial in trials:
            if trial.is_answered_whole:
                self._model.truncate(0)
                num_answered += is_answered(
                    self._model, self._controller, trial.retained[candidate], trial.hidden
                )
        self._model.truncate(0)
        needed = [trial.needed[candidate] for trial in trials]
        return {
            "num_asked": len(trials),
            "num_kept": sum(least <= candidate.k for least in needed),
            "num_dense_answered": sum(trial.is_answered_whole for trial in trials),
            "num_answered": num_answered,
            "margin": round(1 - max(needed) / candidate.k, 4),
        }


def most_needed(k: int) -> float:
    """Return the largest k that a layer may need for `k` to be enough, with the margin."""
    return k * (1 - LEAST_MARGIN)


def most_lost(num_asked: int) -> int:
    """Return how many of `num_asked` may be lost; at least one, because chance loses one of a few."""
    return math.ceil(num_asked * (100 - GOAL_PERCENT) / 100)
