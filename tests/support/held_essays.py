"""Essays in a loaded model: what delta loses there, with parameters from a text of another kind."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from essays import essays

from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibrator import CalibrationContext
from lowtide.attention.delta.calibrate import HeadwiseSearch, spread_groups, spread_thresholds
from lowtide.attention.delta.policy import Delta
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import Distance, Reference, read_prompt
from lowtide.attention.evaluation.passkeys import (
    Passkey,
    chat_framing,
    continued,
    hide_passkey,
    make_passkey,
)
from lowtide.attention.policy import PassController
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.evaluation.text import read_sample, sample_tokens
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

SCORED = 200
DEPTHS = (0.9, 0.5, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is measured: `SCORED` tokens after `prefix` tokens of essays at each offset, and `num_keys`
    passkeys, every other one with two equal neighbours, at each depth of prompts of each of `lengths`.

    The parameters are from `context` tokens of Python's language reference.
    """

    context: int
    prefix: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    num_keys: int

    @property
    def room(self) -> int:
        """The context that all of it needs."""
        return max(self.context, self.prefix + SCORED, *self.lengths) + 256


SHORT = Trial(context=2048, prefix=1600, offsets=(0, 6000, 12000), lengths=(1000, 2000), num_keys=6)
LONG = Trial(context=4096, prefix=4000, offsets=(0, 8000), lengths=(4000,), num_keys=4)
LONGER = Trial(context=4096, prefix=8000, offsets=(0, 8000), lengths=(8000,), num_keys=4)


@dataclass(frozen=True, slots=True)
class Essays:
    """A loaded model and a text that nothing was calibrated on."""

    loaded: Engine
    token_ids: list[int]
    trial: Trial

    @staticmethod
    @contextlib.contextmanager
    def open(
        path: Path,
        policy: Delta,
        trial: Trial = SHORT,
        kv_type: str = "f16",
        threads: int = 2,
        *,
        repack: bool = True,
    ) -> Iterator[Essays]:
        """Load a model with room for any parameters that the policy may get."""
        options = LoadConfig(
            memory="4GiB",
            context=trial.room,
            threads=threads,
            attention="dense",
            attention_memory=policy.calibrator.memory(read_spec(path)),
            repack=repack,
            kv_type=kv_type,
        )
        loaded = Engine(plan_reference(path, options))
        text = loaded.model.tokenizer.encode(essays(), add_special=True, parse_special=False)
        try:
            yield Essays(loaded, text, trial)
        finally:
            loaded.close()

    @property
    def hook(self) -> LlamaHook:
        assert self.loaded.hook is not None
        return self.loaded.hook

    @property
    def dense(self) -> PassController:
        return DenseController(self.hook)

    def controller(self, policy: Delta) -> PassController:
        spec = self.loaded.model.spec
        return policy.resolve(spec).configure(self.hook, spec)

    def texts(self) -> Iterator[list[int]]:
        """Yield the tokens that are read and scored at each offset."""
        for offset in self.trial.offsets:
            end = 1 + offset + self.trial.prefix + SCORED
            yield [self.token_ids[0], *self.token_ids[1 + offset : end]]

    def distance(self, policy: Delta) -> tuple[Distance, ScoreCost]:
        """Return the distance from dense attention over all offsets, and the cost of scores."""
        model, total, before = self.loaded.model, Distance(), self.hook.counts()
        for text in self.texts():
            model.truncate(0)
            reference = Reference(model, self.dense, text, self.trial.prefix, SCORED)
            total += reference.distance(self.controller(policy))
        return total, self.hook.counts().scores - before.scores

    def passkeys(self) -> Iterator[Passkey]:
        """Yield the prompts with hidden passkeys."""
        model, trial = self.loaded.model, self.trial
        framing = chat_framing(model)
        for length, depth, seed in itertools.product(trial.lengths, DEPTHS, range(trial.num_keys)):
            key = make_passkey(90 + seed, doubled=seed % 2 == 1)
            haystack = self.token_ids[1 + 3000 * seed :]
            yield hide_passkey(model, haystack, framing, length, depth, key)

    def answer(self, policy: Delta | None, passkey: Passkey) -> str:
        """Return the answer to a passkey, under dense attention if there is no policy."""
        self.loaded.model.truncate(0)
        controller = self.dense if policy is None else self.controller(policy)
        return continued(self.loaded.model, controller, passkey.token_ids)

    def keys_found(self, policy: Delta) -> tuple[int, list[str]]:
        """Return how many passkeys dense attention finds, and the policy's wrong answers to these."""
        dense, lost = 0, []
        for passkey in self.passkeys():
            if passkey.key not in self.answer(None, passkey):
                continue
            dense += 1
            answer = self.answer(policy, passkey)
            if passkey.key not in answer:
                where = f"{passkey.depth:.0%} of {passkey.length:,}"
                lead = self.lead(passkey)
                lost.append(f"{passkey.key} at {where} (dense by {lead:.2f} nats): {answer!r}")
        return dense, lost

    def lead(self, passkey: Passkey) -> float:
        """Return by how much dense attention prefers the passkey at its most doubtful token, in nats.

        Near 0 any rounding decides; below 0 dense attention answers it in other tokens.
        """
        model, dense = self.loaded.model, self.dense
        model.truncate(0)
        leads = []
        with read_prompt(model, dense, passkey.token_ids[:-1]):
            inputs = (passkey.token_ids[-1], *passkey.answer_ids[:-1])
            for token_id, answer_id in zip(inputs, passkey.answer_ids, strict=True):
                dense.begin_decode()
                logits = np.array(model.forward((token_id,)))
                leads.append(float(logits[answer_id] - np.delete(logits, answer_id).max()))
        return min(leads)

    def of_sparsity(self, policy: Delta, sparsity: float) -> Delta:
        """Return the policy with the sparsity spread over layers and heads, on the reference."""
        model, context = self.loaded.model, self.trial.context
        sample = read_sample(None, 2 * context)
        text = sample_tokens(model.tokenizer, sample, 2 * context + 2, source="the reference")
        calibration_context = CalibrationContext(
            model=model,
            hook=self.hook,
            token_ids=text,
            context=context,
            framing=chat_framing(model),
            text="the reference",
        )
        search = HeadwiseSearch(calibration_context, lambda params: replace(policy, params=params))
        if policy.channels is None:
            (params,) = spread_groups(search, [sparsity])
        else:
            (params,) = spread_thresholds(search, [sparsity], policy.channels)
        return replace(policy, params=params, source="spread over layers and heads")
