"""What `quality` means: the fastest policy whose calibration is inside the quality's limit, for a model and a length.

Time is predicted by the bytes that are read: a token of the answer reads the weights and the keys and values that
its policy attends to, a token of the prompt computes a part of that. Calibrations are those that ship with lowtide
and the user's own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from lowtide.attention.calibration import CalibrationError, find_file, write_values
from lowtide.attention.dense import Dense
from lowtide.attention.policy import CalibratedPolicy
from lowtide.attention.registry import calibrated_policies
from lowtide.memory.plan.estimates import kv_bytes
from lowtide.models.arguments.names import option
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.backend import ResolvedModel
from lowtide.runtime.backends.config import FAST, HIGH
from lowtide.runtime.backends.quality_choice import QualityChoice

LIMITS = {HIGH: 0.005, FAST: 0.02}
"""The largest mean KL divergence from exact attention, in nats/token."""
PROMPT_COST = 1 / 8
"""What a token of a prompt costs, as a share of one that is decoded: batches share the weights that they read."""
LONG = 1024
"""Tokens in the KV cache behind a long answer."""
WORTH_SAYING = 0.85
WORTHWHILE = 0.95
"""A policy is taken if its predicted time is at most this share of exact attention's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedLength:
    """Tokens of the prompt and of its answer; `is_question` where it is known to be a chat's question."""

    prompt_tokens: int
    answer_tokens: int
    is_question: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens in the KV cache at the end of the answer."""
        return self.prompt_tokens + self.answer_tokens


def stays_exact(quality: str, reason: str) -> QualityChoice:
    """Return the choice of exact attention, and why."""
    return QualityChoice(
        quality=quality, sentence=f"quality {quality} stays exact, because {reason}"
    )


def choose(spec: ModelSpec, quality: str, length: ExpectedLength) -> QualityChoice:
    """Return the policy with the shortest predicted time inside the quality's limit; exact where none saves time."""
    inside = [
        found
        for found in calibrated_policies(spec, length.prompt_tokens, length.num_tokens)
        if (
            length.is_question and quality == FAST
            if found.kl is None
            else found.kl <= LIMITS[quality]
        )
    ]
    if not inside:
        limit = LIMITS[quality]
        return stays_exact(
            quality,
            f"{spec.name} has no calibration inside KL {limit}: lowtide calibrate --target-kl {limit} makes one",
        )
    shares = [_time_share(spec, found, length) for found in inside]
    share, best = min(zip(shares, inside, strict=True), key=lambda pair: pair[0])
    if share > WORTHWHILE:
        return stays_exact(
            quality, f"no calibrated policy saves time at {length.num_tokens:,} tokens"
        )
    return QualityChoice(
        quality=quality,
        sentence=f"quality {quality} takes {best.policy.name}: {best.distance}, and about {share:.0%} of the time of "
        f"exact attention, predicted for {length.num_tokens:,} tokens",
        found=best,
        time_share=share,
    )


def _time_share(spec: ModelSpec, found: CalibratedPolicy, length: ExpectedLength) -> float:
    """Return the predicted time with a policy as a share of the time with exact attention."""

    def seconds(keys_read: float, prompt_computed: float) -> float:
        cached = kv_bytes(spec, length.num_tokens, spec.kv_types[0])
        of_prompt = length.prompt_tokens * PROMPT_COST * (spec.weight_bytes + cached / 2)
        of_answer = length.answer_tokens * (spec.weight_bytes + keys_read * cached)
        return prompt_computed * of_prompt + of_answer

    return seconds(found.keys_read, found.prompt_computed) / max(seconds(1.0, 1.0), 1.0)


def saving(
    planned: ResolvedModel, prompt_tokens: int, answer_tokens: int, *, is_question: bool = False
) -> str | None:
    """Return, once a model, what the quality "fast" would save of a long exact answer; None where that is little.

    Nothing is said where answers are not exact already, and where no calibration tells the distance.
    """
    spec, options = planned.spec, planned.options
    is_exact = options.attention == Dense.name and planned.quality is None
    if not is_exact or prompt_tokens + answer_tokens < LONG:
        return None
    length = ExpectedLength(
        prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, is_question=is_question
    )
    chosen = choose(spec, FAST, length)
    name = f"quality-said-{spec.fingerprint}.json"
    if chosen.found is None or chosen.time_share > WORTH_SAYING or find_file(name) is not None:
        return None
    with contextlib.suppress(
        CalibrationError
    ):  # the folder may not be writable: then it is said again
        write_values(name, {"model": spec.name})
    return (
        f"At {length.num_tokens:,} tokens {option('quality', FAST)} would take about {chosen.time_share:.0%} of the "
        f"time (predicted), with {chosen.found.policy.name}: {chosen.found.distance}. This is said once for each model."
    )
