"""KernelChoice: who computes attention and matmuls, lowtide's kernels or the engine's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

NO_ROOM = "the budget has no room for lowtide's kernels"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """Which of lowtide's kernels run; `reason` says why not all of them, None where all do."""

    attention: bool = False
    repack: bool = False
    reason: str | None = None

    def without(
        self, *, attention: bool = False, repack: bool = False, reason: str | None
    ) -> KernelChoice:
        """Return the choice without the kernels that are named, and why; None where that is said elsewhere."""
        return replace(
            self,
            attention=self.attention and not attention,
            repack=self.repack and not repack,
            reason=reason,
        )


NO_KERNELS = KernelChoice()
