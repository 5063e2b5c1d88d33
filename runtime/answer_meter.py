"""AnswerMeter: takes the times and counts of one answer. Knows no loop."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowtide.attention.graph_hook import HookCounts
from lowtide.memory.meter import read_process_memory
from lowtide.models.model import Model
from lowtide.runtime.statistics import Statistics

if TYPE_CHECKING:
    from lowtide.runtime.generate import Prompt, RunFacts


class AnswerMeter:
    """Takes the times and counts of one answer."""

    def __init__(self, model: Model, prompt: Prompt, seed: int, facts: RunFacts) -> None:
        self._model = model
        self._prompt = prompt
        self._seed = seed
        self._facts = facts
        self.reused_tokens = self.restored_tokens = 0
        self.kept_tokens = len(prompt.token_ids)
        self.generated_tokens = 0
        self._prefill_s = 0.0
        self._layers_ours = 0
        self._at_prompt: HookCounts | None = None
        self._first_token_s: float | None = None
        self._first_token_at = 0.0
        self._now = self._started_at = time.perf_counter()

    def prefilled(self) -> None:
        """The prompt's last pass is done."""
        self._now = time.perf_counter()
        self._prefill_s = self._now - self._started_at
        self._at_prompt = self._facts.hook_counts()
        self._layers_ours = self._at_prompt.layers_ours if self._at_prompt else 0

    def sampled(self) -> None:
        """A token was sampled."""
        self._now = time.perf_counter()
        self.generated_tokens += 1
        if self._first_token_s is None:
            self._first_token_at = self._now
            self._first_token_s = self._now - self._prompt.asked_at

    def statistics(self) -> Statistics:
        """Return what is known while the answer goes on."""
        num_tokens = len(self._prompt.token_ids)
        return Statistics(
            prompt_tokens=num_tokens + self._prompt.dropped_tokens,
            reused_tokens=self.reused_tokens,
            restored_tokens=self.restored_tokens,
            kept_tokens=self.kept_tokens,
            dropped_tokens=self._prompt.dropped_tokens,
            dropped_messages=self._prompt.dropped_messages,
            generated_tokens=self.generated_tokens,
            prefill_s=self._prefill_s,
            decode_s=self._now - self._first_token_at if self.generated_tokens else 0.0,
            time_to_first_token_s=self._first_token_s,
            layers_ours=self._layers_ours,
            layers=self._model.spec.num_layers,
            attention=self._facts.attention,
            packed_tensors=self._facts.packed_tensors,
            unpacked_reason=self._facts.unpacked_reason,
            seed=self._seed,
            budget_bytes=self._facts.budget_bytes,
            planned_bytes=self._facts.planned_bytes,
            batch=self._facts.batch,
            trims=self._facts.watchdog.trims,
        )

    def final(self) -> Statistics:
        """Return everything, at the end of the answer."""
        return replace(
            self.statistics(),
            peak_rss_bytes=read_process_memory().peak_bytes,
            attended_share=self._attended_share(),
            scores=self._scores(),
            speculation=self._facts.speculator.statistics() if self._facts.speculator else None,
        )

    def _attended_share(self) -> float | None:
        """Return how much of the cache decoding attended to since the prompt."""
        now = self._facts.hook_counts()
        if now is None or self._at_prompt is None:
            return None
        held = now.keys_held - self._at_prompt.keys_held
        return (now.keys_read - self._at_prompt.keys_read) / held if held else None

    def _scores(self) -> dict[str, Any] | None:
        """Return what the scores of decoding cost since the prompt; None where no key was a state."""
        now = self._facts.hook_counts()
        if now is None or self._at_prompt is None:
            return None
        cost = now.scores - self._at_prompt.scores
        return cost.to_dict() if cost.channels_behind else None
