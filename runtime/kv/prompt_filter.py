"""PromptFilter: reads a prompt through the first layers, and keeps what its end attends to (GemFilter).

Knows no text but what it is asked to explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.bindings.policy import PromptScorer
from lowtide.attention.policy import PromptSelector
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.models.errors import LowtideError
from lowtide.models.model import Model
from lowtide.models.tokenizer import common_prefix
from lowtide.runtime.profiling.retention_map import RetainedSpan, RetentionMap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredPrompt:
    """A prompt of which the tokens at `positions` were kept; `scores` has one for each of its tokens."""

    token_ids: Sequence[int]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def kept_ids(self) -> list[int]:
        """The tokens that were kept."""
        return [self.token_ids[position] for position in self.positions]

    @property
    def runs(self) -> list[NDArray[np.int64]]:
        """The positions, neighbours together."""
        import numpy as np

        return np.split(self.positions, np.flatnonzero(np.diff(self.positions) != 1) + 1)


class PromptFilter:
    """Filters prompts by the rule of a resolved policy; `last` is what it did last.

    `reader` has a cache of its own on the model's weights, with `scorer` in its graph, and `growth`
    reserves that. Where it `keeps` what it has read, another question on the same text costs its own rows.
    """

    def __init__(
        self,
        reader: Model,
        scorer: PromptScorer,
        selector: PromptSelector,
        growth: KVReservation | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        self._reader = reader
        self._scorer = scorer
        self._selector = selector
        self._growth = growth
        self._held: list[int] = []
        self.keeps = keeps
        self.last: FilteredPrompt | None = None

    def applies_to(self, token_ids: Sequence[int]) -> bool:
        """Whether the prompt is long enough."""
        return self._selector.applies_to(len(token_ids))

    def most_tokens(self) -> int:
        """Return how long a prompt may be now."""
        limit = self._reader.context
        return self._growth.most_tokens(limit) if self._growth else limit

    def filtered(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt that are kept.

        Raises `LowtideError` where the layer's attention is not ours, `OverBudget`, before anything is
        computed, where the cache may not grow so far.
        """
        if self._growth is not None:
            self._growth.admit(len(token_ids))
        try:
            self._read(token_ids)
            scores = self._scorer.prompt_scores(len(token_ids))
        finally:
            self._scorer.run_whole_passes()
            if not self.keeps:
                self.forget()
        if scores is None:
            raise LowtideError(
                f"gem cannot choose at layer {self._selector.layer} of {self._reader.spec.name}, whose attention is "
                "not as we know it: name another layer, or use --attention llama"
            )
        positions = self._selector.retained(scores)
        self.last = FilteredPrompt(token_ids=token_ids, positions=positions, scores=scores)
        return self.last.kept_ids

    def forget(self) -> None:
        """Give up what was read: the next prompt is read from its beginning."""
        self._reader.truncate(0)
        self._held.clear()
        if self._growth is not None:
            self._growth.admit(0)

    def close(self) -> None:
        """Free the reader's context; the model's weights stay."""
        self._reader.close()

    def passages(self) -> list[RetainedSpan]:
        """Return what was kept last, neighbours together, and nothing where nothing was filtered yet."""
        if self.last is None:
            return []
        token_ids, scores = self.last.token_ids, self.last.scores
        return [
            RetainedSpan(
                position=int(run[0]),
                tokens=len(run),
                score=round(float(scores[run].max()), 4),
                text=self._reader.tokenizer.decode([token_ids[position] for position in run]),
            )
            for run in self.last.runs
        ]

    def retention_map(self) -> RetentionMap:
        """Return where what was kept last lies in its prompt."""
        assert self.last is not None, "nothing was filtered yet"
        return RetentionMap.of(self.last.scores, self.last.positions, self.passages())

    def _read(self, token_ids: Sequence[int]) -> None:
        """The rows that score all lie in the last pass, so the first one is what does not fill others."""
        begin = self._rewound_to(token_ids)
        rows = self._reader.batch_size
        ends = [*range(len(token_ids), begin, -rows)][::-1]
        for start, end in zip([begin, *ends], ends, strict=False):
            is_last = end == ends[-1]
            self._scorer.score_prompt(self._selector.layer, self._selector.rule, is_last=is_last)
            self._reader.forward(token_ids[start:end])
            self._held.extend(token_ids[start:end])

    def _rewound_to(self, token_ids: Sequence[int]) -> int:
        """Go back to the longest common beginning and return its length; the rows that score are read anew.

        Also removes what an interrupted pass may have left behind.
        """
        common = common_prefix(self._held, token_ids)
        kept = self._reader.truncate(
            max(min(common, len(token_ids) - self._selector.rule.num_rows), 0)
        )
        del self._held[kept:]
        return kept
