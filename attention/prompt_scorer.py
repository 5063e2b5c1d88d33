"""PromptScorer: where one layer scores a prompt, in llama.cpp's graph or an ONNX graph's session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowtide.attention.prompt_scores import ScoreRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PromptScorer(Protocol):
    """What GemFilter's first pass sets of it, between passes."""

    def score_prompt(self, layer: int, rule: ScoreRule, *, is_last: bool) -> None:
        """Have passes from now on end behind the attention of `layer`; the last one scores every key there.

        What such a pass returns as logits means nothing.
        """

    def run_whole_passes(self) -> None:
        """Have passes go through all layers again."""

    def prompt_scores(self, num_keys: int) -> NDArray[np.float32] | None:
        """Return the scores of the first `num_keys` keys; None where the last pass did not make them."""
