"""Evaluate a policy: its distance from dense attention on a text, and passkeys; filters have their own part.

`evaluation_config` says how to load a model for that, `evaluate` measures it. The measures of a prompt filter
stand in runtime/evaluation/prompt_filter.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import WINDOW_TOKENS, Reference, read_prompt
from lowtide.attention.evaluation.passkeys import (
    Framing,
    finds,
    hide_passkey,
    make_passkey,
)
from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.models.arguments.names import option
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec
from lowtide.runtime.evaluation.prompt_filter import evaluate_filter
from lowtide.runtime.evaluation.report import Evaluation, PasskeyResult
from lowtide.runtime.evaluation.text import (
    BUILT_IN,
    MIN_CONTEXT,
    SPARE_TOKENS,
    Progress,
    framing_of,
    measured_depths,
    read_sample,
    sample_tokens,
)
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig

PASSKEY_DEPTHS = (0.1, 0.5, 0.9)


def evaluation_config(config: LoadConfig, policy: AttentionPolicy, context: int) -> LoadConfig:
    """Return `config` with what measuring `policy` up to `context` tokens needs.

    A filter is measured on a model that reads whole prompts, with the policy that follows the filter.
    """
    config = replace(config, context=context + SPARE_TOKENS, expected_tokens=context + SPARE_TOKENS)
    if policy.prompt_selector is None:
        return replace(config, compared_tokens=WINDOW_TOKENS)
    return replace(
        config,
        attention=policy.following,
        compared_tokens=1,
        attention_memory=replace(policy.memory, filter_prefill=None),  # prompts are read whole
    )


def require_approximation(policy: AttentionPolicy, spec: ModelSpec) -> None:
    """Raise `BadOption`, before anything is planned, for a policy that is not lowtide's own attention."""
    if not policy.uses_native_kernels:
        raise _engines_own(spec)


def _engines_own(spec: ModelSpec) -> BadOption:
    return BadOption(
        f"{option('attention')} is {spec.engine}'s own, which differs from dense attention only by rounding: "
        f"evaluate an approximation such as {option('attention', 'tidal')}"
    )


def evaluate(
    engine: Engine,
    policy: AttentionPolicy | None = None,
    *,
    context: int,
    text: Path | None = None,
    windows: int = 8,
    passkey_lengths: Sequence[int] | None = None,
    kinds: Sequence[str] = (*KINDS, *HARD_KINDS),
    template_arguments: Mapping[str, Any] | None = None,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Measure a resolved policy (the engine's own, if None) at `windows` depths up to `context` tokens.

    Passkeys are hidden at three depths of each of `passkey_lengths` tokens; None means half of the context
    and all of it. A filter is asked questions of `kinds` instead. Both are asked with the chat template, with
    `template_arguments`. Raises `BadOption` if the text is too short, the context does not fit, or the engine runs
    its own attention.
    """
    policy = policy or engine.planned.policy
    if policy.prompt_selector is not None:
        return evaluate_filter(
            engine,
            policy,
            context=context,
            text=text,
            windows=windows,
            kinds=kinds,
            template_arguments=template_arguments,
            progress=progress,
        )
    model, kernels = engine.model, engine.attention_kernels
    if kernels is None:
        raise _engines_own(model.spec)
    if not MIN_CONTEXT <= context <= model.context - SPARE_TOKENS:
        raise BadOption(
            f"{option('context')} is {context}; it must be between {MIN_CONTEXT} and {model.context - SPARE_TOKENS}, "
            f"because {SPARE_TOKENS} more tokens must fit into the planned {model.context}"
        )
    framing = framing_of(engine, template_arguments)
    source = BUILT_IN if text is None else str(text)
    sample = read_sample(text, model.context)
    engine.require_room_to_tokenise(sample)
    token_ids = sample_tokens(model.tokenizer, sample, context + SPARE_TOKENS, source=source)
    dense, controller = DenseController(kernels), engine.controller
    distances = []
    model.truncate(0)
    for depth in measured_depths(context, windows):
        progress(f"comparing {WINDOW_TOKENS} tokens at a depth of {depth:,}")
        reference = Reference(model, dense, token_ids, depth)
        distances.append((depth, reference.distance(controller)))
    share, scores = _keys_read(model, kernels, controller, token_ids[: context + 1])
    lengths = passkey_lengths if passkey_lengths is not None else (context // 2, context)
    passkeys = _find_passkeys(engine, dense, token_ids[1:], framing, lengths, progress)
    return Evaluation(
        attention=str(policy),
        context=context,
        text=source,
        distances=tuple(distances),
        passkeys=passkeys,
        keys_read=share,
        scores=scores if scores.channels_merged else None,
    )


def _keys_read(
    model: Model, kernels: AttentionKernels, controller: PassController, token_ids: Sequence[int]
) -> tuple[float, ScoreCost]:
    """Return the share of the cached keys that a decoded token attends to, and the cost of its scores."""
    with read_prompt(model, controller, token_ids[:-1]):
        before = kernels.counts()
        controller.begin_decode()
        model.forward((token_ids[-1],))
        after = kernels.counts()
    share = (after.keys_read - before.keys_read) / (after.keys_visible - before.keys_visible)
    return share, after.scores - before.scores


def _find_passkeys(
    engine: Engine,
    dense: PassController,
    haystack: Sequence[int],
    framing: Framing,
    lengths: Sequence[int],
    progress: Progress,
) -> tuple[PasskeyResult, ...]:
    """Hide a passkey at every depth of every length and ask for it, with dense attention and the policy."""
    model = engine.model
    results = []
    for length in lengths:
        for depth in PASSKEY_DEPTHS:
            progress(f"asking for a passkey at {depth:.0%} of {length:,} tokens")
            seed = length * 10 + round(depth * 10)
            passkey = hide_passkey(model, haystack, framing, length, depth, make_passkey(seed))
            model.truncate(0)
            found_by_dense = finds(model, dense, passkey)
            found = finds(model, engine.controller, passkey)
            results.append(
                PasskeyResult(length=length, depth=depth, dense=found_by_dense, found=found)
            )
    return tuple(results)
