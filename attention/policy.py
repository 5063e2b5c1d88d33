"""AttentionPolicy: the one interface between a policy and the rest of lowtide.

A policy is a value that says which keys a query attends to. It brings everything of its own: its settings,
its memory in the plan, the configuration of the kernels, and how it is calibrated. Nothing outside its
folder knows it by name but the registry.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import ScoreRule
from lowtide.attention.calibrator import Calibrator
from lowtide.memory.plan.attention import NO_ATTENTION_MEMORY, AttentionMemory
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

USER = "user"
"""The `source` of settings that the user chose; others are described in words."""

Policy = TypeVar("Policy", bound="AttentionPolicy")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that the command line accepts, as in `tidal:k=512`.

    `read` converts the text and raises `ValueError` for a bad one; `expected` completes "it must be" in the
    error. `field` is the policy's field if it has another name.
    """

    name: str
    read: Callable[[str], Any] = int
    expected: str = "a whole number"
    field: str | None = None


def read_share(text: str) -> float:
    """Read a share: 0.25, or 25%."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def read_k(text: str) -> int | float:
    """Read a number of tokens: 512, or a share of the context or prompt: 10%."""
    if not text.endswith("%"):
        return int(text)
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError
    return min(share, 0.999999)  # 1 would be one token; with all tokens attention is dense anyway


CALIBRATION = Setting("calibration", Path, "a file")


class PassController:
    """Prepares the kernels before every forward pass; this one has nothing to prepare."""

    exact_prefill: bool = True
    """Whether prompts are read as dense attention reads them."""
    correction_interval: int | None = None
    """Recompute the keys and values of decoded tokens exactly every so many tokens; None: never."""

    def begin_prefill(self) -> None:
        """Prepare for tokens of a prompt, or tokens that are recomputed."""

    def begin_decode(self) -> None:
        """Prepare for a token after the prompt, or for draft tokens to verify."""


class PromptSelector(Protocol):
    """Selects the tokens of a prompt that all layers read, by the scores of one layer."""

    @property
    def layer(self) -> int:
        """The layer that scores the prompt's keys, counted from 0; later layers do not read it."""

    @property
    def rule(self) -> ScoreRule:
        """How the layer scores a key."""

    def applies_to(self, num_tokens: int) -> bool:
        """Whether a prompt of `num_tokens` tokens is filtered."""

    def retained(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the positions to retain, ascending, from the scores (tokens,) of a prompt."""

    def needed_k(self, scores: NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> int:
        """Return the smallest k that surely retains every token of `spans`, begin and end each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedPolicy:
    """A policy, resolved for a model, with its measured distance from exact attention in words.

    `kl` is the mean KL divergence in nats/token, None where answers were counted instead: such a policy is for
    questions alone. `keys_read` is the share of the cached keys that a token of the answer reads,
    `prompt_computed` the share of a prompt's tokens and layers that are computed.
    """

    policy: AttentionPolicy
    distance: str
    kl: float | None
    keys_read: float
    prompt_computed: float = 1.0


class AttentionPolicy(ABC):
    """A rule for attention: exact, or an approximation.

    As the user wrote it, settings may be None; `resolve` fills them in for a model. Subclasses are frozen
    dataclasses; all methods but `resolve`, `calibrator` and `describe` need a resolved policy.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[Setting, ...]] = ()
    """The settings that the command line accepts; other fields are set from Python."""
    uses_native_kernels: ClassVar[bool] = True
    """Whether lowtide's kernels run it, in place of the engine's attention."""
    supports_batch: ClassVar[bool] = False
    """Whether it can attend to several sequences in one KV cache."""
    can_follow_filter: ClassVar[bool] = False
    """Whether it can attend to the tokens that a prompt filter retained."""

    @classmethod
    def parse(cls: type[Policy], text: str) -> Policy:
        """Return the policy with settings such as "k=512,layers=2+13".

        Raises `BadOption` for an unknown setting or a bad value.
        """
        return cls(**dict(cls._setting(part) for part in text.split(",") if part))

    @classmethod
    def _setting(cls, part: str) -> tuple[str, Any]:
        name, _, value = part.partition("=")
        setting = next((setting for setting in cls.settings if setting.name == name), None)
        if setting is None:
            names = ", ".join(setting.name for setting in cls.settings) or "none"
            raise BadOption(
                f"{cls.name} has no setting {name!r}; its settings are: {names} (as in tidal:k=512)"
            )
        try:
            return setting.field or name, setting.read(value)
        except ValueError:
            raise BadOption(
                f"{cls.name}'s {name} is {value!r}; it must be {setting.expected}"
            ) from None

    @classmethod
    def calibrated(
        cls, spec: ModelSpec, prompt_tokens: int, num_tokens: int
    ) -> list[CalibratedPolicy]:
        """Return the policy with each of the model's calibrations, and what it saves.

        The KV cache holds `num_tokens` tokens at the end of the answer, `prompt_tokens` of them of the prompt.
        """
        return []

    def resolve(self: Policy, spec: ModelSpec) -> Policy:
        """Return the policy with every setting filled in for the model.

        Raises `BadOption` if the model cannot run it as it is set.
        """
        return self

    @property
    def memory(self) -> AttentionMemory:
        """The memory that the policy adds to a plan."""
        return NO_ATTENTION_MEMORY

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Configure the kernels for the policy, and return the controller of forward passes."""
        return PassController()

    @property
    def cache_key(self) -> str:
        """Identifies everything that the keys and values of a forward pass depend on."""
        return str(self)

    @property
    def shares_selection(self) -> bool:
        """Whether all tokens of a decoding pass attend to one selection of keys.

        Draft tokens then attend to other keys than they would one by one.
        """
        return False

    @property
    def prompt_selector(self) -> PromptSelector | None:
        """What shortens prompts before all layers read them; None if nothing does."""
        return None

    @property
    def following(self) -> AttentionPolicy:
        """The policy that attends to the KV cache: another one than this for a prompt filter."""
        return self

    @property
    def completion_refusal(self) -> str | None:
        """Why the policy should not continue a plain text, and what to do instead; None if it can."""
        return None

    @property
    def calibrator(self) -> Calibrator | None:
        """Finds the policy's settings for a model; None if there is nothing to find."""
        return None

    def describe(self) -> str:
        """Describe the policy and its settings in a few words."""
        return self.name

    def __str__(self) -> str:
        return self.describe()
