"""Finds the layer that GemFilter can choose by: the cheapest that keeps what questions ask for.

Sentences are hidden in a text at several depths of two lengths, and asked for (`questions`). A prompt is
read once, by all layers; then every layer scores it, by its last rows alone. What a layer needs is the k
that keeps the worst-placed sentence whole: one that does not see the whole prompt, or does not look for
what is asked, needs nearly all of it. Layers that need less than k by a margin are tried end to end, the
cheapest first, on text and questions that the search did not see, each alone in its text: what was kept
has to answer what the whole prompt answers. The paper picks its layer by hand (arXiv 2409.17422, section
3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.passkeys import Framing
from lowtide.attention.evaluation.questions import (
    KINDS,
    Haystack,
    HiddenQuestion,
    WholePrompt,
    ask,
    is_answered,
)
from lowtide.attention.gem.policy import Gem, GemCalibration, kept_positions, needed_k
from lowtide.models.errors import BadOption
from lowtide.models.model import Model

DEPTHS = (0.15, 0.5, 0.85)
LEAST_MARGIN = 0.25
"""The search leaves so much of k: it sees few sentences."""
GOAL_PERCENT = 95
"""Of the answers of whole prompts, so many have to be kept, and so many sentences, but for one."""
MAX_TRIED = 6
"""Settings that are tried end to end."""
K_CHOICES = (512, 768, 1024)
CONTEXTS_OF_K = 4
"""The context is at least so many k: a filter that keeps most of a prompt shows nothing."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GemSetting:
    """A layer and a k, and the k that the layer needed in the search."""

    layer: int
    k: int
    needed_k: int

    def cost(self, num_layers: int, context: int) -> float:
        """Return the tokens of a whole prompt that a filtered one of `context` tokens costs."""
        return (self.layer + 1) / num_layers * context + self.k


@dataclass(slots=True)
class _Trial:
    """A question that the search did not see, and what settings keep of its prompt."""

    hidden: HiddenQuestion
    is_answered_whole: bool
    kept: dict[GemSetting, list[int]] = field(default_factory=dict)
    needed: dict[GemSetting, int] = field(default_factory=dict)


class GemSearch:
    """Searches one model for the layer to filter by, with `policy`'s rule.

    `token_ids` are a text of `context` tokens twice over: the first half is searched on, the second is
    what a choice is held against. A stated `policy.layer` is the only one that is looked at.
    """

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        policy: Gem,
        progress: Progress = lambda _: None,
    ) -> None:
        window = model.spec.sliding_window
        if window is not None and context < 2 * window:
            raise BadOption(
                f"context is {context}, and {model.spec.name} has sliding windows of {window} tokens: "
                f"{2 * window} or more are wanted, so that it shows which layers see beyond"
            )
        half = len(token_ids) // 2
        self._searched, self._held_out = (
            Haystack(model.tokenizer, text, framing)
            for text in (token_ids[1:half], token_ids[half:])
        )
        self._model = model
        self._controller = DenseController(hook)
        self._whole = WholePrompt(model, hook, policy.rule)
        self._context = context
        self._lengths = (context // 2, context)
        self._policy = policy
        self._progress = progress

    def calibration(self, k_choices: Sequence[int], *, text: str) -> GemCalibration:
        """Return the cheapest setting that holds, of the k there are to choose from; `text` names the text.

        Raises `NotCalibrated` where none does.
        """
        for k in k_choices:
            if CONTEXTS_OF_K * k > self._context:
                raise BadOption(
                    f"k is {k} and the context {self._context}: {CONTEXTS_OF_K * k} or more tokens of "
                    "context are wanted, so that a filter has something to leave out"
                )
        settings = self._settings(k_choices)
        trials = self._trials(settings)
        num_answered_whole = sum(trial.is_answered_whole for trial in trials)
        if not num_answered_whole:
            raise NotCalibrated(
                f"{self._model.spec.name} answers none of {len(trials)} questions from whole prompts, so "
                "that a filter has no answers to keep: use another model, or a smaller --context"
            )
        for setting in settings:
            found = self._measured(setting, trials, text)
            self._progress(
                f"layer {setting.layer}, k {setting.k}, on other text: keeps {found.num_kept} of "
                f"{found.num_asked}, and {found.num_answered} of {found.num_dense_answered} answers"
            )
            lost_answers = found.num_dense_answered - found.num_answered
            holds = lost_answers <= most_lost(found.num_dense_answered)
            if holds and found.num_asked - found.num_kept <= most_lost(found.num_asked):
                return found
        raise NotCalibrated(
            f"layer {settings[0].layer} of {self._model.spec.name} with k {settings[0].k} keeps less than "
            f"{GOAL_PERCENT}% of the sentences or of the answers of whole prompts, on other text: raise --k"
        )

    def _settings(self, k_choices: Sequence[int]) -> list[GemSetting]:
        """Return those that keep every hidden sentence with a margin, the cheapest first."""
        needed = self._needed(max(k_choices))
        settings = [
            GemSetting(layer, k, least)
            for layer, least in needed.items()
            for k in k_choices
            if least <= most_needed(k)
        ]
        spec = self._model.spec
        settings.sort(key=lambda setting: setting.cost(spec.num_layers, self._context))
        return settings[:MAX_TRIED]

    def _needed(self, k: int) -> dict[int, int]:
        """Return the layers that keep every sentence with `k`, and the k that each needs for it."""
        stated = self._policy.layer
        needed = dict.fromkeys(
            range(self._model.spec.num_layers) if stated is None else (stated,), 0
        )
        for hidden in questions_in_one_text(self._searched, self._lengths, seed=0):
            self._whole.hold(hidden.token_ids)
            for layer in needed:
                needed[layer] = max(needed[layer], self._needed_by(layer, hidden))
            remaining = {layer: least for layer, least in needed.items() if least <= most_needed(k)}
            if not remaining:
                best = min(needed, key=lambda layer: needed[layer])
                raise NotCalibrated(
                    f"no layer of {self._model.spec.name} keeps every hidden sentence with k {k} and a "
                    f"margin: layer {best}, the last one that did, needs a k of {needed[best]} for a "
                    f"{hidden}; raise --k"
                )
            needed = remaining
            self._progress(f"{hidden}: {len(needed)} layers keep it, {min(needed)} is the first")
        return needed

    def _needed_by(self, layer: int, hidden: HiddenQuestion) -> int:
        scores = self._whole.scores(layer)
        if scores is None:
            return len(hidden.token_ids)
        return needed_k(scores, self._policy, hidden.spans)

    def _trials(self, settings: Sequence[GemSetting]) -> list[_Trial]:
        """Read what the search did not see, and choose from it by every setting."""
        trials = []
        for hidden in questions_alone(self._held_out, self._lengths, seed=1):
            self._whole.hold(hidden.token_ids)
            trial = _Trial(hidden, self._whole.answers(hidden))
            for setting in settings:
                scores = self._whole.scores(setting.layer)
                assert scores is not None, "the layer has scored before"
                kept = kept_positions(scores, replace(self._policy, k=setting.k))
                trial.kept[setting] = [hidden.token_ids[position] for position in kept]
                trial.needed[setting] = needed_k(scores, self._policy, hidden.spans)
            trials.append(trial)
            answered = "answered" if trial.is_answered_whole else "not answered"
            self._progress(f"{hidden}, on other text: {answered} from the whole prompt")
        self._whole.forget()
        return trials

    def _measured(self, setting: GemSetting, trials: Sequence[_Trial], text: str) -> GemCalibration:
        """Answer from what a setting keeps wherever the whole prompt answers."""
        num_answered = 0
        for trial in trials:
            if trial.is_answered_whole:
                self._model.truncate(0)
                num_answered += is_answered(
                    self._model, self._controller, trial.kept[setting], trial.hidden
                )
        self._model.truncate(0)
        needed = [trial.needed[setting] for trial in trials]
        return GemCalibration(
            fingerprint=self._model.spec.fingerprint,
            model=self._model.spec.name,
            layer=setting.layer,
            k=setting.k,
            **self._policy.rule_settings,
            num_asked=len(trials),
            num_kept=sum(least <= setting.k for least in needed),
            num_dense_answered=sum(trial.is_answered_whole for trial in trials),
            num_answered=num_answered,
            margin=round(1 - max(needed) / setting.k, 4),
            context=self._context,
            text=text,
        )


def most_needed(k: int) -> float:
    """Return the most that a layer may need for `k` tokens to be enough, with the margin."""
    return k * (1 - LEAST_MARGIN)


def most_lost(num_asked: int) -> int:
    """Return how many of so many may be lost: at least one, since a few cannot tell it from chance."""
    return math.ceil(num_asked * (100 - GOAL_PERCENT) / 100)


def questions_in_one_text(
    haystack: Haystack, lengths: Sequence[int], seed: int
) -> Iterator[HiddenQuestion]:
    """Yield a question of each of `KINDS` at every depth of prompts of every length.

    Those of all kinds share a text, in which each lies at a depth of its own: one reading serves them all.
    Another seed asks for others.
    """
    for index, length in enumerate(lengths):
        for turn in range(len(DEPTHS)):
            number = (seed * len(lengths) + index) * len(DEPTHS) + turn
            asked = [
                (ask(kind, number), DEPTHS[(at + turn) % len(DEPTHS)])
                for at, kind in enumerate(KINDS)
            ]
            yield from haystack.hide(asked, length)


def questions_alone(
    haystack: Haystack, lengths: Sequence[int], seed: int, kinds: Sequence[str] = KINDS
) -> Iterator[HiddenQuestion]:
    """Yield the same of `kinds`, each in a text with nothing else hidden in it.

    What two prompts begin with is read once: the deepest come first.
    """
    for index, length in enumerate(lengths):
        for turn, depth in reversed(list(enumerate(DEPTHS))):
            number = (seed * len(lengths) + index) * len(DEPTHS) + turn
            for kind in kinds:
                yield from haystack.hide([(ask(kind, number), depth)], length)
