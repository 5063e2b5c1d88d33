"""Evaluation: a policy's measured distance from dense attention on a model, text and needles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import WINDOW_TOKENS, Distance, Reference, read_prompt
from lowtide.attention.evaluation.passkeys import chat_framing, finds, hide_passkey, make_passkey
from lowtide.attention.policy import PassController
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.runtime.evaluation.text import BUILT_IN, read_sample, sample_tokens
from lowtide.runtime.loading.load import Engine

PASSKEY_DEPTHS = (0.1, 0.5, 0.9)
SPARE_TOKENS = WINDOW_TOKENS + 1
MIN_CONTEXT = 256

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskeyResult:
    """Whether a pass key at `depth` of `length` tokens was found by dense attention and by the policy."""

    length: int
    depth: float
    dense: bool
    found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured: `distances` by depth in tokens, `passkeys` by length and depth."""

    attention: str
    context: int
    text: str
    distances: tuple[tuple[int, Distance], ...]
    passkeys: tuple[PasskeyResult, ...]
    keys_read: float
    scores: ScoreCost | None = None

    @property
    def distance(self) -> Distance:
        """Over all places."""
        return sum((distance for _, distance in self.distances), Distance())

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "attention": self.attention,
            "context": self.context,
            "text": self.text,
            "tokens": self.distance.num_tokens,
            **_measures(self.distance),
            "keys_read": self.keys_read,
            "scores": self.scores.to_dict() if self.scores else None,
            "places": [{"depth": depth, **_measures(found)} for depth, found in self.distances],
            "passkeys": {
                "asked": len(self.passkeys),
                "dense": sum(passkey.dense for passkey in self.passkeys),
                "found": sum(passkey.found for passkey in self.passkeys),
                "cases": [
                    {"length": n.length, "depth": n.depth, "dense": n.dense, "found": n.found}
                    for n in self.passkeys
                ],
            },
        }


def _measures(distance: Distance) -> dict[str, float]:
    return {
        "kl": distance.kl,
        "nll_change": distance.nll_change,
        "top1_agreement": distance.top1_agreement,
    }


def evaluate(
    loaded: Engine,
    *,
    context: int,
    text: Path | None = None,
    windows: int = 8,
    passkey_lengths: Sequence[int] | None = None,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Measure the loaded model's policy at `windows` places up to `context` tokens deep.

    Needles are hidden at three depths of each of `passkey_lengths` (None: half the context and all of it).
    Raises `BadOption` where the text is too short or the policy is the engine's own attention.
    """
    model, kernels = loaded.model, loaded.attention_kernels
    if kernels is None:
        raise BadOption(
            f"attention is {model.spec.engine}'s own: its distance from our dense kernels is rounding; "
            "evaluate an approximation such as --attention tidal"
        )
    if loaded.planned.policy.prompt_selector is not None:
        raise BadOption(
            "attention is gem, which shortens prompts before they are read: `evaluate_filter` measures it, "
            "and what follows it is --attention dense or tidal"
        )
    if not MIN_CONTEXT <= context <= model.context - SPARE_TOKENS:
        raise BadOption(
            f"context is {context}: {MIN_CONTEXT} to {model.context - SPARE_TOKENS} tokens are wanted, "
            f"so that {SPARE_TOKENS} more fit the {model.context} that are planned"
        )
    whose = BUILT_IN if text is None else str(text)
    sample = read_sample(text, model.context)
    token_ids = sample_tokens(model.tokenizer, sample, context + SPARE_TOKENS, whose=whose)
    dense, controller = DenseController(kernels), loaded.controller
    distances = []
    model.truncate(0)
    for depth in measured_depths(context, windows):
        progress(f"comparing {WINDOW_TOKENS} tokens at {depth:,}")
        place = Reference(model, dense, token_ids, depth)
        distances.append((depth, place.distance(controller)))
    share, scores = _read_at(model, kernels, controller, token_ids[: context + 1])
    lengths = passkey_lengths if passkey_lengths is not None else (context // 2, context)
    passkeys = _passkeys(loaded, dense, token_ids[1:], lengths, progress)
    return Evaluation(
        attention=str(loaded.planned.policy),
        context=context,
        text=whose,
        distances=tuple(distances),
        passkeys=passkeys,
        keys_read=share,
        scores=scores if scores.channels_behind else None,
    )


def measured_depths(context: int, windows: int) -> list[int]:
    """Return places from three quarters of the context to all of it, each beyond the one before."""
    start = context * 3 // 4
    steps = max(windows - 1, 1)
    return sorted({context - (context - start) * step // steps for step in range(windows)})


def _read_at(
    model: Model, kernels: AttentionKernels, controller: PassController, token_ids: Sequence[int]
) -> tuple[float, ScoreCost]:
    """Return the share of the cached keys that a decoded token attends to, and what its scores cost."""
    with read_prompt(model, controller, token_ids[:-1]):
        before = kernels.counts()
        controller.begin_decode()
        model.forward((token_ids[-1],))
        after = kernels.counts()
    share = (after.keys_read - before.keys_read) / (after.keys_held - before.keys_held)
    return share, after.scores - before.scores


def _passkeys(
    loaded: Engine,
    dense: PassController,
    haystack: Sequence[int],
    lengths: Sequence[int],
    progress: Progress,
) -> tuple[PasskeyResult, ...]:
    model = loaded.model
    framing = chat_framing(model)
    results = []
    for length in lengths:
        for depth in PASSKEY_DEPTHS:
            progress(f"a pass key at {depth:.0%} of {length:,} tokens")
            seed = length * 10 + round(depth * 10)
            passkey = hide_passkey(model, haystack, framing, length, depth, make_passkey(seed))
            model.truncate(0)
            by_dense = finds(model, dense, passkey)
            by_policy = finds(model, loaded.controller, passkey)
            results.append(
                PasskeyResult(length=length, depth=depth, dense=by_dense, found=by_policy)
            )
    return tuple(results)
