"""WholePrompt: a prompt that a model holds exactly in all layers, and the scores that each would filter by.

A filter reads a prompt through its first layers alone; here one reading serves every layer, and the
prompt can be answered from, too. Knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.attention.dense import DenseSteering
from lowtide.attention.haystack import HiddenQuestion, is_answered
from lowtide.attention.kernel_host import KernelHost
from lowtide.attention.prompt_scores import ScoreRule
from lowtide.attention.quality import extend, text_nll
from lowtide.models.model import Model
from lowtide.models.tokenizer import common_prefix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class WholePrompt:
    """One prompt after another on one model; `rule` is how a layer scores."""

    def __init__(self, model: Model, host: KernelHost, rule: ScoreRule) -> None:
        self._model = model
        self._host = host
        self._rule = rule
        self._dense = DenseSteering(host)
        self.token_ids: Sequence[int] = ()

    def hold(self, token_ids: Sequence[int]) -> None:
        """Hold another prompt; what it has in common with the last one is not read again."""
        self._model.truncate(common_prefix(self.token_ids, token_ids))
        self.token_ids = token_ids
        extend(self._model, self._dense, self._head)

    def forget(self) -> None:
        """Hold nothing: others may use the model."""
        self._model.truncate(0)
        self.token_ids = ()

    def scores(self, layer: int) -> NDArray[np.float32] | None:
        """Return every token's score by a layer, shape (tokens,); None where its attention is not ours."""
        extend(self._model, self._dense, self._head)
        self._host.score_prompt(layer, self._rule, is_last=True)
        try:
            self._model.forward(self.token_ids[len(self._head) :])
            return self._host.prompt_scores(len(self.token_ids))
        finally:
            self._host.run_whole_passes()
            self._model.truncate(len(self._head))

    def answers(self, hidden: HiddenQuestion) -> bool:
        """Whether dense attention answers the question of the prompt that is held."""
        return is_answered(self._model, self._dense, self.token_ids, hidden)

    def nll(self, targets: Sequence[int]) -> float:
        """Return how unlikely dense attention makes what follows the prompt, in nats over all of it."""
        return text_nll(self._model, self._dense, self.token_ids, targets)

    @property
    def _head(self) -> Sequence[int]:
        """All but the rows that score."""
        return self.token_ids[: max(len(self.token_ids) - self._rule.num_rows, 0)]
