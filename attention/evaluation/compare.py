"""Compares policies with dense attention at positions of a text, and at passkeys hidden in it.

A divergence averaged over a text does not show that one passage is lost. At a passkey the divergence does
not count, but how much less likely the right answer becomes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.calibrator import CalibrationContext, Targets
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Distance, Reference
from lowtide.attention.evaluation.passkeys import hide_passkey, make_passkey
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.models.model import Model
from lowtide.models.text.tokenizer import common_prefix

NUM_POSITIONS = 3
POSITION_STEP = 160
"""Tokens between the positions that are compared."""
PASSKEY_DEPTHS = (0.8, 0.65, 0.5, 0.35, 0.2)
"""Where passkeys are hidden, as shares of the context, the deepest first: a common prefix is read once."""
LEAST_LENGTH = 512
"""A question in a wordy chat template takes some hundred tokens."""


@dataclass(frozen=True, slots=True)
class Distances:
    """The distance of a policy from dense attention, along a text and at passkeys.

    `key_loss` is the mean over passkeys of how much the log likelihood of the passkey falls, in nats (a gain
    counts as 0); `keys_lost` counts the passkeys that dense attention answers and the policy does not.
    `keys_read` is the share of the cached keys that a token of the text attended to.
    """

    text: Distance = field(default_factory=Distance)
    key_loss: float = 0.0
    keys_lost: int = 0
    keys_read: float = 0.0


def divergence_metrics(
    kl: float, key_loss: float, keys_read: float, targets: Targets
) -> dict[str, float]:
    """Return the metrics of a calibration that was held against dense attention."""
    return {
        "kl": round(kl, 5),
        "target_kl": targets.kl,
        "key_loss": round(key_loss, 5),
        "target_key_loss": targets.key_loss,
        "keys_read": round(keys_read, 4),
    }


class EvalPositions:
    """Positions of one text, of at least `context` + 1 tokens, that `model` reads up to the context.

    `seed` selects the passkeys. With `is_thorough` they are also hidden in half of the context, and every
    other passkey has two equal neighbouring digits. A comparison leaves the cache with the beginning of some
    prompt.
    """

    def __init__(
        self,
        model: Model,
        kernels: AttentionKernels,
        token_ids: Sequence[int],
        context: int,
        framing: Callable[[str], str],
        seed: int,
        *,
        is_thorough: bool = False,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._dense = DenseController(kernels)
        self._text = token_ids
        last = context - POSITION_STEP
        self._starts = [last - POSITION_STEP * i for i in reversed(range(NUM_POSITIONS))]
        lengths = (last, max(last // 2, LEAST_LENGTH)) if is_thorough else (last,)
        hidden = list(itertools.product(lengths, PASSKEY_DEPTHS))
        self._passkeys = [
            hide_passkey(
                model,
                token_ids,
                framing,
                length,
                depth,
                make_passkey(number, doubled=number % 2 == 1 and is_thorough),
            )
            for number, (length, depth) in enumerate(hidden, seed * len(hidden))
        ]

    @classmethod
    def of(
        cls,
        context: CalibrationContext,
        token_ids: Sequence[int],
        seed: int,
        *,
        is_thorough: bool = False,
    ) -> EvalPositions:
        """Return the positions of a text of a calibration."""
        return cls(
            context.model,
            context.hook,
            token_ids,
            context.context,
            context.framing,
            seed,
            is_thorough=is_thorough,
        )

    def distances(self, policies: Sequence[AttentionPolicy]) -> list[Distances]:
        """Compare every policy with dense attention at every position."""
        totals = [Distances() for _ in policies]
        for reference in self._along_the_text():
            for index, policy in enumerate(policies):
                before = self._kernels.counts()
                distance = reference.distance(self._configured(policy))
                after = self._kernels.counts()
                share = (after.keys_read - before.keys_read) / (
                    after.keys_visible - before.keys_visible
                )
                total = totals[index]
                totals[index] = replace(
                    total,
                    text=total.text + distance,
                    keys_read=total.keys_read + share / NUM_POSITIONS,
                )
        for reference in self._at_passkeys():
            for index, policy in enumerate(policies):
                distance, total = reference.distance(self._configured(policy)), totals[index]
                loss = max(distance.nll_sum - distance.dense_nll_sum, 0.0) / len(self._passkeys)
                totals[index] = replace(
                    total,
                    key_loss=total.key_loss + loss,
                    keys_lost=total.keys_lost + distance.is_lost,
                )
        return totals

    def _configured(self, policy: AttentionPolicy) -> PassController:
        spec = self._model.spec
        return policy.resolve(spec).configure(self._kernels, spec)

    def _along_the_text(self) -> Iterator[Reference]:
        self._model.truncate(0)
        for start in self._starts:
            yield Reference(self._model, self._dense, self._text, start)

    def _at_passkeys(self) -> Iterator[Reference]:
        cached: Sequence[int] = ()
        for passkey in self._passkeys:
            self._model.truncate(common_prefix(cached, passkey.token_ids))
            cached = passkey.token_ids[:-1]
            token_ids = [*passkey.token_ids, *passkey.answer_ids]
            yield Reference(
                self._model, self._dense, token_ids, len(cached), len(passkey.answer_ids)
            )
