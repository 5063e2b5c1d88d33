"""AttentionPolicy: which keys a query sees, as a value. One policy, one file beside this one."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, ClassVar

from lowtide.memory.plan.attention import FirstPass, KeyStates
from lowtide.memory.plan.estimates import KeyGroups
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.bindings.policy import KernelHost


class AttentionPolicy(ABC):
    """A rule for attention: exact, or an approximation that only decoding takes.

    As the user wrote it, it may leave things open; `fitted` to a model, nothing is.
    """

    name: ClassVar[str]
    uses_hook: ClassVar[bool] = True
    """Whether our kernels run it, in llama.cpp's graph."""
    takes_batches: ClassVar[bool] = False
    """Whether it attends in a cache that several sequences share."""

    def fitted(self, spec: ModelSpec) -> AttentionPolicy:
        """Return the policy with everything settled for the model.

        Raises `BadOption` where it asks of the model what that does not have.
        """
        return self

    @property
    def first_pass(self) -> FirstPass | None:
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
    def identity(self) -> str:
        """Everything that the keys and values of a pass depend on."""
        return str(self)

    def install(self, hook: KernelHost, spec: ModelSpec) -> Steering:
        """Give the hook the policy and return what tells it of each pass."""
        return Steering()

    def __str__(self) -> str:
        return self.name


class Steering:
    """Told before every pass what kind it is; this one has nothing to do: every pass is exact.

    Passes of a prompt and of decoding are each as the policy has them.
    """

    exact_prompts: bool = True
    """Whether the rows of a prompt are attended to as dense attention would."""
    correction_interval: int | None = None
    """Every so many decoded tokens their keys and values are computed again, exactly; None is never."""

    def before_prompt(self) -> None:
        """Rows of a prompt come, or rows that are computed again."""

    def before_decode(self) -> None:
        """Rows after the prompt come."""
