"""Evaluate a prompt filter (GemFilter): what it retains of a prompt, and what the model answers from that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowtide.attention.evaluation.divergence import WINDOW_TOKENS, text_nll
from lowtide.attention.evaluation.questions import (
    Haystack,
    HiddenQuestion,
    WholePrompt,
    are_retained,
    is_answered,
    questions_alone,
)
from lowtide.attention.policy import AttentionPolicy, PromptSelector
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption, LowtideError
from lowtide.runtime.evaluation.report import Evaluation, FilteredAnswer, FilterResult
from lowtide.runtime.evaluation.text import (
    BUILT_IN,
    SPARE_TOKENS,
    Progress,
    framing_of,
    measured_depths,
    read_sample,
    sample_tokens,
)
from lowtide.runtime.loading.load import Engine

SEED = 2
"""The questions differ from those of a calibration."""


def evaluate_filter(
    engine: Engine,
    policy: AttentionPolicy,
    *,
    context: int,
    text: Path | None,
    windows: int,
    kinds: Sequence[str],
    template_arguments: Mapping[str, Any] | None,
    progress: Progress,
) -> Evaluation:
    """Measure a resolved filter on an engine that runs the policy behind the filter.

    Questions of `kinds` are hidden at three depths of `context` tokens and of half of that; a text is
    continued at `windows` depths up to `context`. Raises `BadOption` if the text is too short, or if prompts
    of half the context are not filtered.
    """
    selector = policy.prompt_selector
    assert selector is not None, "the policy filters prompts"
    model, kernels = engine.model, engine.attention_kernels
    assert kernels is not None, "the policy behind a filter runs in lowtide's kernels"
    lengths = (context // 2, context)
    if not selector.applies_to(min(lengths)):
        raise BadOption(
            f"{option('context')} is {context}, and prompts of half of it are not filtered ({policy}): raise "
            f"{option('context')}, or lower the policy's k"
        )
    if context > model.context - SPARE_TOKENS:
        raise BadOption(
            f"{option('context')} is {context}; it must be at most {model.context - SPARE_TOKENS}, because "
            f"{SPARE_TOKENS} more tokens must fit into the planned {model.context}"
        )
    framing = framing_of(engine, template_arguments)
    source = BUILT_IN if text is None else str(text)
    sample = read_sample(text, model.context)
    engine.require_room_to_tokenise(sample)
    token_ids = sample_tokens(model.tokenizer, sample, context + SPARE_TOKENS, source=source)
    filtered = _FilteredPrompts(engine, selector, WholePrompt(model, kernels, selector.rule))
    depths = measured_depths(context, windows)
    continuations = list(_read_continuations(filtered, token_ids, depths, progress))
    haystack = Haystack(model.tokenizer, token_ids[1:], framing)
    hidden = questions_alone(haystack, lengths if kinds else (), SEED, kinds)
    asked = list(_read_questions(filtered, hidden, progress))
    progress("answering and continuing from the retained tokens")
    filtered.whole.clear()
    num_tokens = WINDOW_TOKENS * len(continuations)
    dense_nll = sum(one.nll for one in continuations)
    nll = sum(filtered.nll(one.retained, one.targets) for one in continuations)
    answers = (
        replace(answer, found=filtered.answers(retained, question))
        for answer, retained, question in asked
    )
    return Evaluation(
        attention=str(policy),
        context=context,
        text=source,
        filtered=FilterResult(
            answers=tuple(answers),
            num_tokens=num_tokens,
            dense_nll=dense_nll / num_tokens,
            nll=nll / num_tokens,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Retained:
    """The retained tokens of a prompt.

    `has_spans` says whether its marked spans are among them, `needed_k` the k at which they would be.
    """

    token_ids: list[int]
    needed_k: int
    has_spans: bool


@dataclass(frozen=True, slots=True)
class _Continuation:
    """`nll` of the `targets` after the whole text under dense attention, in nats; and what is retained."""

    nll: float
    retained: _Retained
    targets: Sequence[int]


@dataclass(frozen=True, slots=True)
class _FilteredPrompts:
    """Filters prompts with a policy; `whole` reads them for it, on the same model."""

    engine: Engine
    selector: PromptSelector
    whole: WholePrompt

    def retained(self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> _Retained:
        """Read a prompt whole, and return the tokens that the filter retains."""
        self.whole.read(token_ids)
        layer = self.selector.layer
        scores = self.whole.scores(layer)
        if scores is None:
            raise LowtideError(
                f"the prompt filter cannot score at layer {layer} of {self.engine.model.spec.name}, because lowtide's "
                "kernels do not run its attention: name another layer"
            )
        positions = self.selector.retained(scores)
        return _Retained(
            [token_ids[position] for position in positions],
            self.selector.needed_k(scores, spans),
            are_retained(positions, spans),
        )

    def answers(self, retained: _Retained, hidden: HiddenQuestion) -> bool:
        """Whether the model answers a question from the retained tokens."""
        self.engine.model.truncate(0)
        return is_answered(self.engine.model, self.engine.controller, retained.token_ids, hidden)

    def nll(self, retained: _Retained, targets: Sequence[int]) -> float:
        """Return the negative log likelihood of `targets` after the retained tokens, in nats."""
        self.engine.model.truncate(0)
        return text_nll(self.engine.model, self.engine.controller, retained.token_ids, targets)


def _read_continuations(
    filtered: _FilteredPrompts, token_ids: Sequence[int], depths: Sequence[int], progress: Progress
) -> Iterator[_Continuation]:
    """Read the text up to each depth, and yield how it goes on."""
    for depth in depths:
        progress(f"reading {depth:,} tokens to continue them with {WINDOW_TOKENS} more")
        targets = token_ids[depth : depth + WINDOW_TOKENS]
        retained = filtered.retained(token_ids[:depth], ((depth - 1, depth),))
        yield _Continuation(filtered.whole.nll(targets), retained, targets)


def _read_questions(
    filtered: _FilteredPrompts, asked: Iterable[HiddenQuestion], progress: Progress
) -> Iterator[tuple[FilteredAnswer, _Retained, HiddenQuestion]]:
    """Read each question with its text; yield the answer from the whole prompt, and what is retained."""
    for hidden in asked:
        progress(str(hidden))
        retained = filtered.retained(hidden.token_ids, hidden.spans)
        answer = FilteredAnswer(
            kind=hidden.question.kind,
            length=hidden.length,
            depth=hidden.depth,
            retained=retained.has_spans,
            needed_k=retained.needed_k,
            dense=filtered.whole.answers(hidden),
            found=False,
        )
        yield answer, retained, hidden
