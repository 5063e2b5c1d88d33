"""AttentionPolicy: which keys a query sees, as a value. One policy, one file beside this one."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, ClassVar

from lowtide.memory.plan.attention import FilterPrefill, KeyStates
from lowtide.memory.plan.estimates import KeyGroups
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.bindings.policy import AttentionKernels


class AttentionPolicy(ABC):
    """A rule for attention: exact, or an approximation that only decoding takes.

    As the user wrote it, it may leave things open; `resolve` to a model, nothing is.
    """

    name: ClassVar[str]
    uses_native_kernels: ClassVar[bool] = True
    """Whether our kernels run it, in llama.cpp's graph."""
    supports_batch: ClassVar[bool] = False
    """Whether it attends in a cache that several sequences share."""

    def resolve(self, spec: ModelSpec) -> AttentionPolicy:
        """Return the policy with everything settled for the model.

        Raises `BadOption` where it asks of the model what that does not have.
        """
        return self

    @property
    def filter_prefill(self) -> FilterPrefill | None:
        """What reads long prompts whole where the other layers read a part of them: for questions on it."""
        return None

    @property
    def num_selections(self) -> int:
        """How many layers choose keys: what the scratch memory depends on."""
        return 0

    @property
    def key_groups(self) -> KeyGroups | None:
        """What of the keys is kept in groups beside the cache."""
        return None

    @property
    def key_states(self) -> KeyStates | None:
        """What of the keys is kept as states beside the cache."""
        return None

    @property
    def cache_key(self) -> str:
        """Everything that the keys and values of a pass depend on."""
        return str(self)

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Give the hook the policy and return what tells it of each pass."""
        return PassController()

    def __str__(self) -> str:
        return self.name


class PassController:
    """Told before every pass what kind it is; this one has nothing to do: every pass is exact.

    Passes of a prompt and of decoding are each as the policy has them.
    """

    exact_prefill: bool = True
    """Whether the rows of a prompt are attended to as dense attention would."""
    correction_interval: int | None = None
    """Every so many decoded tokens their keys and values are computed again, exactly; None is never."""

    def begin_prefill(self) -> None:
        """Rows of a prompt come, or rows that are computed again."""

    def begin_decode(self) -> None:
        """Rows after the prompt come."""
