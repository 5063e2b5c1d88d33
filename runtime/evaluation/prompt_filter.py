"""FilterEvaluation: what a filtered prompt keeps, what it answers, and how it continues a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowtide.attention.evaluation.divergence import WINDOW_TOKENS, text_nll
from lowtide.attention.evaluation.passkeys import chat_framing
from lowtide.attention.evaluation.questions import (
    HARD_KINDS,
    KINDS,
    Haystack,
    HiddenQuestion,
    WholePrompt,
    are_retained,
    is_answered,
    questions_alone,
)
from lowtide.attention.policy import AttentionPolicy, PromptSelector
from lowtide.models.errors import BadOption, LowtideError
from lowtide.runtime.evaluation.evaluate import SPARE_TOKENS, measured_depths
from lowtide.runtime.evaluation.text import BUILT_IN, read_sample, sample_tokens
from lowtide.runtime.loading.load import Engine

SEED = 2
"""The questions are others than a calibration's."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredAnswer:
    """A question of `kind` about sentences at `depth` of `length` tokens.

    `kept` says whether they were kept whole, for which `needed_k` tokens had been enough; `dense` whether
    the whole prompt answers it under dense attention, `found` whether what was kept does.
    """

    kind: str
    length: int
    depth: float
    kept: bool
    needed_k: int
    dense: bool
    found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterEvaluation:
    """What was measured: `answers`, and the negative log likelihood of `num_tokens` tokens that continue a
    text, in nats a token: after all of it under dense attention, and after what was kept of it."""

    attention: str
    context: int
    text: str
    answers: tuple[FilteredAnswer, ...]
    num_tokens: int
    dense_nll: float
    nll: float

    @property
    def nll_change(self) -> float:
        """By how much what was kept makes the text less likely, as a share."""
        return self.nll / self.dense_nll - 1

    def of_kinds(self, kinds: Sequence[str]) -> list[FilteredAnswer]:
        """Return the answers to questions of some kinds."""
        return [answer for answer in self.answers if answer.kind in kinds]

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "attention": self.attention,
            "context": self.context,
            "text": self.text,
            "tokens": self.num_tokens,
            "dense_nll": self.dense_nll,
            "nll": self.nll,
            "nll_change": self.nll_change,
            "questions": _counted(self.of_kinds(KINDS)),
            "hard_questions": _counted(self.of_kinds(HARD_KINDS)),
        }


@dataclass(frozen=True, slots=True)
class Counts:
    """Of `asked` questions the sentences of `kept` were kept; the whole prompt answers `dense` of them, and
    of these what was kept answers `found`."""

    asked: int
    kept: int
    dense: int
    found: int

    @classmethod
    def of(cls, answers: Sequence[FilteredAnswer]) -> Counts:
        """Count answers."""
        return cls(
            asked=len(answers),
            kept=sum(answer.kept for answer in answers),
            dense=sum(answer.dense for answer in answers),
            found=sum(answer.found for answer in answers if answer.dense),
        )


def _counted(answers: Sequence[FilteredAnswer]) -> dict[str, Any]:
    counts = Counts.of(answers)
    return {
        "asked": counts.asked,
        "kept": counts.kept,
        "dense": counts.dense,
        "found": counts.found,
        "cases": [
            {
                "kind": answer.kind,
                "length": answer.length,
                "depth": answer.depth,
                "kept": answer.kept,
                "needed_k": answer.needed_k,
                "dense": answer.dense,
                "found": answer.found,
            }
            for answer in answers
        ],
    }


def evaluate_filter(
    loaded: Engine,
    policy: AttentionPolicy,
    *,
    context: int,
    text: Path | None = None,
    windows: int = 8,
    kinds: Sequence[str] = (*KINDS, *HARD_KINDS),
    progress: Progress = lambda _: None,
) -> FilterEvaluation:
    """Measure a filter of the loaded model, whose own attention is what follows the filter.

    Questions of `kinds` are asked at three depths of `context` tokens and of half of them; a text is
    continued at `windows` places up to `context`. Raises `BadOption` where the text is too short, or
    prompts of half the context are not filtered.
    """
    model, host = loaded.model, loaded.attention_kernels
    assert host is not None, "what follows a filter runs in our kernels"
    selector = policy.prompt_selector
    assert selector is not None, "the policy filters prompts"
    lengths = (context // 2, context)
    if not selector.applies_to(min(lengths)):
        raise BadOption(
            f"context is {context}, and prompts of half of it are not filtered ({policy}): raise --context, "
            "or lower the policy's k"
        )
    if context > model.context - SPARE_TOKENS:
        raise BadOption(
            f"context is {context}: {SPARE_TOKENS} tokens more are wanted, {model.context} are planned"
        )
    whose = BUILT_IN if text is None else str(text)
    sample = read_sample(text, model.context)
    token_ids = sample_tokens(model.tokenizer, sample, context + SPARE_TOKENS, whose=whose)
    filtered = _Filtered(loaded, selector, WholePrompt(model, host, selector.rule))
    places = list(_read_places(filtered, token_ids, measured_depths(context, windows), progress))
    haystack = Haystack(model.tokenizer, token_ids[1:], chat_framing(model))
    hidden = questions_alone(haystack, lengths if kinds else (), SEED, kinds)
    asked = list(_read_questions(filtered, hidden, progress))
    progress("answering, and going on, from what was kept")
    filtered.whole.clear()
    num_tokens = WINDOW_TOKENS * len(places)
    return FilterEvaluation(
        attention=str(policy),
        context=context,
        text=whose,
        answers=tuple(
            replace(answer, found=filtered.answers(kept, question))
            for answer, kept, question in asked
        ),
        num_tokens=num_tokens,
        dense_nll=sum(nll for nll, _, _ in places) / num_tokens,
        nll=sum(filtered.nll(kept, targets) for _, kept, targets in places) / num_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of a prompt; `needed_k` is what keeps its spans, and `has_spans` whether it does."""

    token_ids: list[int]
    needed_k: int
    has_spans: bool


@dataclass(frozen=True, slots=True)
class _Filtered:
    """Prompts of a loaded model as a policy keeps them; `whole` reads them for it."""

    loaded: Engine
    selector: PromptSelector
    whole: WholePrompt

    def kept(self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> _Kept:
        """Read a prompt, and return what is kept of it."""
        self.whole.read(token_ids)
        layer = self.selector.layer
        scores = self.whole.scores(layer)
        if scores is None:
            raise LowtideError(
                f"gem cannot choose at layer {layer} of {self.loaded.model.spec.name}, whose attention is "
                "not as we know it: name another layer"
            )
        positions = self.selector.retained(scores)
        return _Kept(
            [token_ids[position] for position in positions],
            self.selector.needed_k(scores, spans),
            are_retained(positions, spans),
        )

    def answers(self, kept: _Kept, hidden: HiddenQuestion) -> bool:
        self.loaded.model.truncate(0)
        return is_answered(self.loaded.model, self.loaded.controller, kept.token_ids, hidden)

    def nll(self, kept: _Kept, targets: Sequence[int]) -> float:
        self.loaded.model.truncate(0)
        return text_nll(self.loaded.model, self.loaded.controller, kept.token_ids, targets)


def _read_places(
    filtered: _Filtered, token_ids: Sequence[int], depths: Sequence[int], progress: Progress
) -> Iterator[tuple[float, _Kept, Sequence[int]]]:
    """Yield, of each place, how unlikely the whole text makes what comes, what is kept, and what comes."""
    for depth in depths:
        progress(f"reading {depth:,} tokens, to go on with {WINDOW_TOKENS} more")
        targets = token_ids[depth : depth + WINDOW_TOKENS]
        kept = filtered.kept(token_ids[:depth], ((depth - 1, depth),))
        yield filtered.whole.nll(targets), kept, targets


def _read_questions(
    filtered: _Filtered, asked: Iterable[HiddenQuestion], progress: Progress
) -> Iterator[tuple[FilteredAnswer, _Kept, HiddenQuestion]]:
    """Yield what the whole prompt answers, what is kept of it, and the question."""
    for hidden in asked:
        progress(str(hidden))
        kept = filtered.kept(hidden.token_ids, hidden.spans)
        answer = FilteredAnswer(
            kind=hidden.question.kind,
            length=hidden.length,
            depth=hidden.depth,
            kept=kept.has_spans,
            needed_k=kept.needed_k,
            dense=filtered.whole.answers(hidden),
            found=False,
        )
        yield answer, kept, hidden
