"""PromptFilter: computes a long prompt through the first layers and retains the tokens that its end attends to.

This is the prefill of GemFilter (arXiv 2409.17422): the filter layer's attention scores choose the tokens, and all
layers then read those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.bindings.policy import PromptScorer
from lowtide.attention.policy import PromptSelector
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.models.arguments.names import option
from lowtide.models.errors import LowtideError
from lowtide.models.model import Model
from lowtide.models.text.tokenizer import common_prefix
from lowtide.runtime.profiling.retention_map import RetainedSpan, RetentionMap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredPrompt:
    """A prompt, the `positions` of its retained tokens in ascending order, and a score for each token."""

    token_ids: Sequence[int]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def retained_ids(self) -> list[int]:
        """The retained tokens."""
        return [self.token_ids[position] for position in self.positions]

    @property
    def runs(self) -> list[NDArray[np.int64]]:
        """The retained positions, split where they are not adjacent."""
        import numpy as np

        return np.split(self.positions, np.flatnonzero(np.diff(self.positions) != 1) + 1)


class PromptFilter:
    """Filters prompts by the selector of a resolved policy; `last` is the last filtered prompt.

    `filter_context` is a second KV cache on the model's weights, with `scorer` in its graph; `reservation` reserves
    that cache. With `caches_prompt` the cache keeps the prompt, so another question on the same text costs only
    its own tokens.
    """

    def __init__(
        self,
        filter_context: Model,
        scorer: PromptScorer,
        selector: PromptSelector,
        reservation: KVReservation | None = None,
        *,
        caches_prompt: bool = False,
    ) -> None:
        self._model = filter_context
        self._scorer = scorer
        self._selector = selector
        self._reservation = reservation
        self._token_ids: list[int] = []
        self.caches_prompt = caches_prompt
        self.last: FilteredPrompt | None = None

    def applies_to(self, token_ids: Sequence[int]) -> bool:
        """Return whether the prompt is long enough to be filtered."""
        return self._selector.applies_to(len(token_ids))

    def most_tokens(self) -> int:
        """Return how long a prompt may be now."""
        limit = self._model.context
        return self._reservation.most_tokens(limit) if self._reservation else limit

    def filter(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt that are retained.

        Raises `OverBudget`, before anything is computed, where the cache may not grow so far, and `LowtideError`
        where lowtide's kernels do not run the filter layer.
        """
        if self._reservation is not None:
            self._reservation.admit(len(token_ids))
        try:
            self._prefill(token_ids)
            scores = self._scorer.prompt_scores(len(token_ids))
        finally:
            self._scorer.run_whole_passes()
            if not self.caches_prompt:
                self.clear()
        if scores is None:
            raise LowtideError(
                f"gem cannot filter at layer {self._selector.layer} of {self._model.spec.name}: lowtide's "
                f"kernels do not support its attention; set another layer, or use {option('attention', 'llama')}"
            )
        positions = self._selector.retained(scores)
        self.last = FilteredPrompt(token_ids=token_ids, positions=positions, scores=scores)
        return self.last.retained_ids

    def clear(self) -> None:
        """Remove the prompt from the filter's cache and release its memory."""
        self._model.truncate(0)
        self._token_ids.clear()
        if self._reservation is not None:
            self._reservation.admit(0)

    def close(self) -> None:
        """Free the filter's context; the model's weights stay loaded."""
        self._model.close()

    def retained_spans(self) -> list[RetainedSpan]:
        """Return the spans that were retained of the last filtered prompt; none before the first one."""
        if self.last is None:
            return []
        token_ids, scores = self.last.token_ids, self.last.scores
        return [
            RetainedSpan(
                position=int(run[0]),
                tokens=len(run),
                score=round(float(scores[run].max()), 4),
                text=self._model.tokenizer.decode([token_ids[position] for position in run]),
            )
            for run in self.last.runs
        ]

    def retention_map(self) -> RetentionMap:
        """Return where in the last filtered prompt the retained tokens are."""
        assert self.last is not None, "no prompt was filtered yet"
        return RetentionMap.of(self.last.scores, self.last.positions, self.retained_spans())

    def _prefill(self, token_ids: Sequence[int]) -> None:
        """Compute the prompt; only the first pass may be short, because the last one has all tokens that score."""
        begin = self._truncate_to_prefix(token_ids)
        batch_size = self._model.batch_size
        ends = [*range(len(token_ids), begin, -batch_size)][::-1]
        for start, end in zip([begin, *ends], ends, strict=False):
            is_last = end == ends[-1]
            self._scorer.score_prompt(self._selector.layer, self._selector.rule, is_last=is_last)
            self._model.forward(token_ids[start:end])
            self._token_ids.extend(token_ids[start:end])

    def _truncate_to_prefix(self, token_ids: Sequence[int]) -> int:
        """Keep the longest common prefix and return its length; the tokens that score are computed again.

        Also removes what an interrupted pass may have left in the cache.
        """
        common = common_prefix(self._token_ids, token_ids)
        num_left = self._model.truncate(
            max(min(common, len(token_ids) - self._selector.rule.num_tokens), 0)
        )
        del self._token_ids[num_left:]
        return num_left
