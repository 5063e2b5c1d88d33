"""The distance of a policy from dense attention: KL divergence of next-token distributions along a text.

Both run on the same model, one token at a time, after the same prompt. The prompt is read densely, unless
the policy reads prompts in its own way; so nothing but the policy differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lowtide.attention.policy import PassController
from lowtide.models.model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW_TOKENS = 64
"""Tokens that are compared at one position; their distributions under dense attention are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Sums over the compared tokens; divide by `num_tokens`, or read the properties.

    `num_agreeing` counts the tokens with the same top-1 prediction, `num_dense_right` and `num_right` the
    tokens of the text that are the top-1 prediction of dense attention and of the policy. Divergences and
    likelihoods are in nats.
    """

    num_tokens: int = 0
    kl_sum: float = 0.0
    dense_nll_sum: float = 0.0
    nll_sum: float = 0.0
    num_agreeing: int = 0
    num_dense_right: int = 0
    num_right: int = 0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            num_tokens=self.num_tokens + other.num_tokens,
            kl_sum=self.kl_sum + other.kl_sum,
            dense_nll_sum=self.dense_nll_sum + other.dense_nll_sum,
            nll_sum=self.nll_sum + other.nll_sum,
            num_agreeing=self.num_agreeing + other.num_agreeing,
            num_dense_right=self.num_dense_right + other.num_dense_right,
            num_right=self.num_right + other.num_right,
        )

    @property
    def kl(self) -> float:
        """Mean KL divergence of the policy from dense attention, in nats/token."""
        return self.kl_sum / self.num_tokens

    @property
    def nll_change(self) -> float:
        """Relative change of the text's negative log likelihood."""
        return self.nll_sum / self.dense_nll_sum - 1

    @property
    def is_lost(self) -> bool:
        """Whether dense attention predicts all of the tokens as top-1, and the policy does not."""
        return self.num_dense_right == self.num_tokens > self.num_right

    @property
    def top1_agreement(self) -> float:
        """Share of tokens with the same top-1 prediction."""
        return self.num_agreeing / self.num_tokens


class Reference:
    """A position in a text, with the distributions of dense attention over the next `num_tokens` tokens.

    The model's cache holds the first `start` tokens, read densely by the controller `dense`, and holds them
    again afterwards.
    """

    def __init__(
        self,
        model: Model,
        dense: PassController,
        token_ids: Sequence[int],
        start: int,
        num_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self._model = model
        self._start = start
        self._inputs = token_ids[start : start + num_tokens]
        self._targets = token_ids[start + 1 : start + num_tokens + 1]
        if len(self._targets) < num_tokens:
            raise ValueError(
                f"the text has {len(token_ids)} tokens; it must have {start + num_tokens + 1}"
            )
        self._prompt = token_ids[:start]
        extend(model, dense, self._prompt)
        self._dense = np.empty((num_tokens, model.spec.vocabulary.num_tokens), np.float32)
        for row, logits in enumerate(self._decoded(dense)):
            self._dense[row] = log_softmax(logits)

    def distance(self, controller: PassController) -> Distance:
        """Decode the same tokens under a policy, which reads the prompt again if it reads prompts its own way."""
        total = Distance()
        for row, logits in enumerate(self._decoded(controller)):
            total += _compare(self._dense[row], log_softmax(logits), self._targets[row])
        return total

    def _decoded(self, controller: PassController) -> Iterator[NDArray[np.float32]]:
        with read_prompt(self._model, controller, self._prompt):
            for token_id in self._inputs:
                controller.begin_decode()
                yield self._model.forward((token_id,))


@contextlib.contextmanager
def read_prompt(model: Model, controller: PassController, prompt: Sequence[int]) -> Iterator[None]:
    """Fill the cache with a prompt as a policy reads it, for the block.

    Before, the cache holds a beginning of the prompt, read densely, or nothing. Afterwards it holds the
    prompt if the policy reads prompts densely, else nothing.
    """
    if not controller.exact_prefill:
        model.truncate(0)
    extend(model, controller, prompt)
    yield
    model.truncate(len(prompt) if controller.exact_prefill else 0)


def extend(model: Model, controller: PassController, prompt: Sequence[int]) -> None:
    """Read the rest of `prompt`, of which the cache holds a beginning."""
    controller.begin_prefill()
    num_cached = model.truncate(len(prompt))
    for at in range(num_cached, len(prompt), model.batch_size):
        model.forward(prompt[at : at + model.batch_size])


def text_nll(
    model: Model, controller: PassController, prompt: Sequence[int], targets: Sequence[int]
) -> float:
    """Return the negative log likelihood of the tokens that follow a prompt, summed, in nats.

    The cache holds a beginning of the prompt, as for `read_prompt`.
    """
    total = 0.0
    model.truncate(len(prompt) - 1)
    with read_prompt(model, controller, prompt[:-1]):
        for token_id, target in zip((prompt[-1], *targets[:-1]), targets, strict=True):
            controller.begin_decode()
            total -= float(log_softmax(model.forward((token_id,)))[target])
    return total


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log probabilities, shape (vocabulary,)."""
    shifted = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    result: NDArray[np.float32] = shifted - np.float32(total)
    return result


def _compare(dense: NDArray[np.float32], other: NDArray[np.float32], target: int) -> Distance:
    dense_top1, top1 = int(dense.argmax()), int(other.argmax())
    divergence = (np.exp(dense) * (dense - other)).sum(dtype=np.float64)
    return Distance(
        num_tokens=1,
        kl_sum=max(float(divergence), 0.0),
        dense_nll_sum=-float(dense[target]),
        nll_sum=-float(other[target]),
        num_agreeing=int(dense_top1 == top1),
        num_dense_right=int(dense_top1 == target),
        num_right=int(top1 == target),
    )
