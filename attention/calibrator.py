"""Calibrator: how `lowtide calibrate` finds the settings of a policy for one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import Calibration
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec

Progress = Callable[[str], None]

MARGIN = 0.9
"""Searches aim at this share of the targets: they see few tokens, and would pick a lucky setting."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The most that a policy may lose against dense attention.

    `kl` is the mean KL divergence along a text in nats/token, `key_loss` the mean loss of the log likelihood
    of a passkey hidden in it, in nats.
    """

    kl: float
    key_loss: float


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What the user asked `lowtide calibrate` for; empty `k_choices` leave k to the calibrator."""

    targets: Targets
    max_layers: int
    k_choices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationContext:
    """The model and the text that a search works with.

    `token_ids` are a text of twice `context` tokens: a search runs on the first half, and its result is
    checked on the second. `framing` puts a user's message into the model's chat template, `text` names the
    text in the calibration file.
    """

    model: Model
    hook: LlamaHook
    token_ids: Sequence[int]
    context: int
    framing: Callable[[str], str]
    text: str
    progress: Progress = lambda _: None

    @property
    def halves(self) -> tuple[Sequence[int], Sequence[int]]:
        """The text to search on, and the text to check the result on."""
        half = len(self.token_ids) // 2
        return self.token_ids[:half], self.token_ids[half:]

    def calibration(
        self, key: str, metrics: dict[str, float], params: dict[str, object]
    ) -> Calibration:
        """Return the calibration of this model and text."""
        return Calibration(
            policy=key,
            fingerprint=self.model.spec.fingerprint,
            model=self.model.spec.name,
            context=self.context,
            text=self.text,
            metrics=metrics,
            params=params,
        )


class Calibrator(ABC):
    """Finds the settings of one policy, with the settings that the user fixed."""

    options: ClassVar[Collection[str]] = ("target_kl", "target_key_loss")
    """The command's options that the search uses: of target_kl, target_key_loss, max_layers, k."""
    compared_tokens: ClassVar[int]
    """Distributions over the vocabulary that the search keeps at a time."""

    @property
    @abstractmethod
    def usage(self) -> str:
        """How the policy is typed behind --attention to use what was found."""

    @abstractmethod
    def check(self, spec: ModelSpec, request: CalibrationRequest) -> None:
        """Raise `BadOption`, before anything is loaded, for a request that cannot be met."""

    @abstractmethod
    def memory(self, spec: ModelSpec) -> AttentionMemory:
        """Return the most memory that the search takes beyond dense attention."""

    @abstractmethod
    def search(self, context: CalibrationContext, request: CalibrationRequest) -> Calibration:
        """Search, and return what was found; raises `NotCalibrated` if nothing meets the targets."""

    @abstractmethod
    def describe(self, calibration: Calibration) -> str:
        """Describe in a line what was found, and how far it is from dense attention."""
