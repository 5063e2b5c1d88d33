"""Places where settings are held against dense attention: along a text, and at pass keys hidden in it.

A divergence averaged over a text does not show that one passage is lost. At the keys it is not the
divergence that counts, but how much less likely the right answer becomes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Distance, Reference
from lowtide.attention.evaluation.passkeys import Framing, hide_passkey, make_passkey
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.models.model import Model
from lowtide.models.tokenizer import common_prefix

NUM_PLACES = 3
PLACE_STEP = 160
"""Tokens between the places that are compared."""
KEY_DEPTHS = (0.8, 0.65, 0.5, 0.35, 0.2)
"""Where keys are hidden, as shares of the context: what two prompts begin with is read once."""
LEAST_LENGTH = 512
"""A question in a wordy chat template takes some hundred tokens."""


@dataclass(frozen=True, slots=True)
class Distances:
    """From dense attention: along the text, and at the keys.

    `key_loss` is by how much the log likelihood of a hidden key falls, as a mean over all keys, in nats
    (a gain counts as 0), `keys_lost` how many that dense attention answers the policy does not; `keys_read`
    is the share of the cached keys that a token of the text attended to.
    """

    text: Distance = field(default_factory=Distance)
    key_loss: float = 0.0
    keys_lost: int = 0
    keys_read: float = 0.0


class EvalPositions:
    """Those of one text, of at least `context` + 1 tokens, read by `model` up to the context.

    `seed` says which keys are hidden: another one hides others. With `is_thorough` they are hidden in half
    of the context, too, and every other has two neighbours equal. A comparison leaves the cache with some
    beginning of a prompt.
    """

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        seed: int,
        *,
        is_thorough: bool = False,
    ) -> None:
        self._model = model
        self._hook = hook
        self._dense = DenseController(hook)
        self._text = token_ids
        last = context - PLACE_STEP
        self._starts = [last - PLACE_STEP * i for i in reversed(range(NUM_PLACES))]
        lengths = (last, max(last // 2, LEAST_LENGTH)) if is_thorough else (last,)
        hidden = list(itertools.product(lengths, KEY_DEPTHS))
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

    def distances(self, policies: Sequence[AttentionPolicy]) -> list[Distances]:
        """Hold every policy against dense attention at every place."""
        totals = [Distances() for _ in policies]
        for place in self._along_the_text():
            for index, policy in enumerate(policies):
                before = self._hook.counts()
                distance = place.distance(self._installed(policy))
                after = self._hook.counts()
                share = (after.keys_read - before.keys_read) / (after.keys_held - before.keys_held)
                total = totals[index]
                totals[index] = replace(
                    total,
                    text=total.text + distance,
                    keys_read=total.keys_read + share / NUM_PLACES,
                )
        for place in self._at_keys():
            for index, policy in enumerate(policies):
                distance, total = place.distance(self._installed(policy)), totals[index]
                lost = max(distance.nll_sum - distance.dense_nll_sum, 0.0) / len(self._passkeys)
                totals[index] = replace(
                    total,
                    key_loss=total.key_loss + lost,
                    keys_lost=total.keys_lost + distance.is_lost,
                )
        return totals

    def _installed(self, policy: AttentionPolicy) -> PassController:
        spec = self._model.spec
        return policy.resolve(spec).install(self._hook, spec)

    def _along_the_text(self) -> Iterator[Reference]:
        self._model.truncate(0)
        for start in self._starts:
            yield Reference(self._model, self._dense, self._text, start)

    def _at_keys(self) -> Iterator[Reference]:
        held: Sequence[int] = ()
        for passkey in self._passkeys:
            self._model.truncate(common_prefix(held, passkey.token_ids))
            held = passkey.token_ids[:-1]
            token_ids = [*passkey.token_ids, *passkey.answer_ids]
            yield Reference(self._model, self._dense, token_ids, len(held), len(passkey.answer_ids))
