"""PromptFilter: reads a prompt through the first layers, and keeps what its end attends to (GemFilter).

Knows no text but what it is asked to explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.attention.gem import Gem, kept_positions
from lowtide.attention.graph_hook import GraphHook
from lowtide.models.errors import LowtideError
from lowtide.models.model import Model

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
    """Filters the prompts of one model by one policy, fitted to it; `last` is what it did last."""

    def __init__(self, model: Model, hook: GraphHook, policy: Gem) -> None:
        assert policy.layer is not None, "the policy is not fitted to a model"
        self._model = model
        self._hook = hook
        self._policy = policy
        self._layer = policy.layer
        self.last: FilteredPrompt | None = None

    def applies_to(self, token_ids: Sequence[int]) -> bool:
        """Whether the prompt is long enough."""
        return self._policy.applies_to(len(token_ids))

    def filtered(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt that are kept; leaves the KV cache empty.

        Raises `LowtideError` where the layer's attention is not ours.
        """
        self._model.truncate(0)
        try:
            self._read(token_ids)
            scores = self._hook.prompt_scores(len(token_ids))
        finally:
            self._hook.run_whole_passes()
            self._model.truncate(0)
        if scores is None:
            raise LowtideError(
                f"gem cannot choose at layer {self._layer} of {self._model.spec.name}, whose attention is "
                "not as we know it: name another layer, or use --attention llama"
            )
        positions = kept_positions(scores, self._policy)
        self.last = FilteredPrompt(token_ids=token_ids, positions=positions, scores=scores)
        return self.last.kept_ids

    def passages(self) -> list[dict[str, Any]]:
        """Return what was kept last, neighbours together, and nothing where nothing was filtered yet.

        Each has `position`, `tokens`, `score` (the highest of its tokens') and `text`.
        """
        if self.last is None:
            return []
        token_ids, scores = self.last.token_ids, self.last.scores
        return [
            {
                "position": int(run[0]),
                "tokens": len(run),
                "score": round(float(scores[run].max()), 4),
                "text": self._model.tokenizer.decode([token_ids[position] for position in run]),
            }
            for run in self.last.runs
        ]

    def _read(self, token_ids: Sequence[int]) -> None:
        """The rows that score all lie in the last pass, so the first one is what does not fill others."""
        rows = self._model.max_rows
        ends = [*range(len(token_ids), 0, -rows)][::-1]
        for begin, end in zip([0, *ends], ends, strict=False):
            self._hook.score_prompt(self._layer, self._policy.rule, is_last=end == ends[-1])
            self._model.forward(token_ids[begin:end])
